"""Runs every GPU kernel on small cases of each class of shapes, under compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-name kns=mosaic_gpu python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --kernel-name kns=mosaic_gpu python benchmarks/sanitize.py

The script uses no test runner and no autotuning, and allocates every array separately, so an access past the
end of an array does not fall into another one. It compares results with XLA's operations on the CPU within a
loose tolerance; ``pytest -m gpu`` tests exactness.
"""

import os

os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding import policy, sampling
from grinqh_jax.model import attention, expert_products, gated_mlp, norm
from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.experts import Router
from grinqh_jax.model.layer_spec import GatedExperts
from pallas_kernels import Activations, NestedWeight, codes, decode_rows, dequantization, layout
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.experts import grouped
from pallas_kernels.experts import mosaic_gpu as experts_kernel
from pallas_kernels.experts import reference as experts_reference
from pallas_kernels.matmul import reference as level_reference
from pallas_kernels.matmul.mosaic_gpu import kernel as level_kernel
from pallas_kernels.matvec import mosaic_gpu, reference
from pallas_kernels.matvec.mosaic_gpu import Config, DenseRows

TOLERANCE = 2e-2
"""Largest relative norm of the difference: two or three roundings to bfloat16."""

EPS = 1e-6

CAPACITY, PAGE_SIZE = 304, 16
"""Number of positions of a cache, and of a page."""

Case = tuple[str, Callable[..., Any], Callable[..., Any], tuple]
"""``(name, kernel, reference in XLA's operations, arguments of both)``. Both return one or several arrays."""


def random_weight(k: int, n: int, max_bits: int) -> NestedWeight:
    rng = np.random.default_rng(k + n)
    stored_k, stored_n = layout.padded_shape(k, n)
    planes = rng.integers(0, 2**32, (max_bits // 2, stored_k, stored_n // layout.WORD_DIGITS), np.uint32)
    scales = rng.uniform(0.5, 1.5, (stored_k // layout.GROUP, stored_n)).astype(np.float16)
    gains = np.append(rng.uniform(0.5, 1.5, max_bits // 2 - 1), 1).astype(np.float32)
    return NestedWeight(planes, scales, k, n, gains)


def matvec_cases() -> Iterator[Case]:
    """All splits of a group over warps, padded and whole shapes, all classes of rows, planes and dtypes."""
    classes = [
        (384, 1024, 1, 8, "float32", 0, Config(warpgroups=1, warps_per_group=1, ring_slots=4)),
        (384, 1024, 1, 8, "bfloat16", 16, Config(warpgroups=1, warps_per_group=4, ring_slots=2)),
        (384, 1024, 2, 8, "bfloat16", 48, Config(warpgroups=2, warps_per_group=2, ring_slots=8)),
        (384, 1024, 4, 8, "bfloat16", 3, Config(warpgroups=2, warps_per_group=4, ring_slots=16)),
        (256, 512, 8, 8, "bfloat16", 16, None),
        (1000, 600, 5, 8, "float16", 0, None),
        *((300, 700, 3, bits, "float32", 5, None) for bits in (2, 4, 6, 8)),
        (64, 100, 1, 8, "bfloat16", 0, None),
        (384, 1024, 2, 8, "bfloat16", 16, dense_rows(1, 1, DenseRows(tiles=2))),
        (384, 1024, 4, 8, "bfloat16", 3, dense_rows(2, 4, DenseRows(ring_slots=16))),
        (1000, 600, 7, 6, "float16", 48, dense_rows(1, 2, DenseRows(step_planes=4))),
        (300, 700, 16, 8, "float32", 0, dense_rows(2, 1, DenseRows())),
        (256, 512, 13, 2, "bfloat16", 5, dense_rows(1, 4, DenseRows(ring_slots=4))),
    ]
    for k, n, rows, max_bits, dtype, parts, config in classes:
        rng = np.random.default_rng(rows)
        weight = random_weight(k, n, max_bits)
        x = jnp.asarray(rng.standard_normal((rows, k)), dtype)
        squares = np.asarray(rng.uniform(0, 1, (rows, parts)), np.float32) if parts else None
        thresholds = np.sort(rng.uniform(0, 1.5, (rows, max_bits // 2)), axis=1).astype(np.float32)
        inputs = Activations.of(x, squares, EPS)
        yield (
            f"matvec {k}x{n}, {rows} rows, {max_bits} bits, {dtype}, norm in {parts} partial sums, {config}",
            lambda *arguments, config=config: mosaic_gpu.partial_sums(*arguments, config=config)[0].array,
            lambda *arguments: reference.partial_sums(*arguments)[0].array,
            (inputs, weight, thresholds),
        )


def dense_rows(warpgroups: int, warps_per_group: int, tuning: DenseRows) -> Config:
    return Config(warpgroups=warpgroups, warps_per_group=warps_per_group, ring_slots=4, dense_rows=tuning)


def level_matmul_cases() -> Iterator[Case]:
    """Exact and rounded weights, one and several units of a CTA, padded shapes, all levels."""
    for k, n, rows, level in [
        (384, 1024, 16, 3),
        (300, 700, 64, 4),
        (2048, 2560, 130, 1),
        (576, 1100, 256, 2),
    ]:
        x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, k)), jnp.bfloat16)
        yield (
            f"product at level {level} {k}x{n}, {rows} rows",
            lambda x, weight, level=level: level_kernel.matmul(x, weight, level),
            lambda x, weight, level=level: level_reference.matmul(x, weight, level),
            (x, random_weight(k, n, 8)),
        )


def sampling_cases() -> Iterator[Case]:
    """All ways to choose a token; the vocabulary is no multiple of what a CTA takes."""
    settings = [(0.0, 0, 1.0, 0.0), (0.6, 20, 0.95, 0.0), (1.0, 0, 0.9, 0.0), (1.5, 1000, 0.99, 0.05)]
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*settings, strict=True))
    drawn = sampling.Sampling(
        *(jnp.asarray(a, d) for a, d in zip((temperature, top_k, top_p, min_p), "fiff", strict=True)),
        jnp.arange(4, dtype=jnp.uint32),
    )
    logits = 3 * np.random.default_rng(0).standard_normal((4, 5003)).astype(np.float32)
    arguments = logits, drawn, np.arange(4, dtype=np.int32)
    yield (
        "sampling of 4 rows of 5003 tokens",
        lambda *a: sampling.choose_tokens(*a, policy.GPU),
        lambda *a: sampling.sample(*a, policy.GPU),
        arguments,
    )


def rows_cases() -> Iterator[Case]:
    def sums(partials, features):
        return Activations.sums(jnp.asarray(partials), features).astype(jnp.bfloat16)

    for rows, columns, parts in [(1, 4096, 16), (3, 1024, 4), (2, 300, 1), (1, 12288, 8)]:
        rng = np.random.default_rng(columns)
        _, stored = layout.padded_shape(1, 2 * columns)
        x = jnp.asarray(rng.standard_normal((rows, 1, columns)), jnp.bfloat16)
        norm_scale = jnp.asarray(rng.uniform(0.5, 1.5, columns), jnp.bfloat16)
        both = rng.standard_normal((parts, rows, 1, stored)).astype(np.float32)
        update, gate_up = sums(both, columns), sums(both, 2 * columns)
        shape = f"{rows}x{columns}, {parts} parts"
        yield (
            f"residual and norm {shape}",
            lambda *arguments: decode_rows.add_norm(*arguments, EPS)[1].array,
            lambda x, update, scale: norm.rms_norm(x + update.array, scale, EPS),
            (x, update, norm_scale),
        )
        yield (
            f"SwiGLU {shape}",
            lambda gate_up: decode_rows.swiglu(gate_up).array,
            lambda gate_up: gated_mlp.gated(gate_up.astype(jnp.float32)).array,
            (gate_up,),
        )


def mixture_cases() -> Iterator[Case]:
    """Router, products of experts and SwiGLU; the products share rows of x and thresholds or do not."""
    for features, experts, chosen, rows, dtype in [
        (512, 128, 8, 1, "bfloat16"),
        (72, 60, 4, 3, "bfloat16"),
        (256, 8, 2, 16, "float32"),
        (512, 512, 10, 2, "bfloat16"),
    ]:
        rng = np.random.default_rng(experts)
        x = jnp.asarray(rng.standard_normal((rows, 1, features)), jnp.bfloat16)
        kernel = jnp.asarray(4 * features**-0.5 * rng.standard_normal((features, experts)), dtype)
        inputs = Activations.of(x, rng.uniform(0.1, 0.3, (rows, 1, 4)).astype(np.float32), EPS)

        def route(inputs, kernel, chosen=chosen):
            # ``supports`` declines on the CPU, so the reference is XLA's router.
            routed = Router(kernel)(inputs, GatedExperts(chosen=chosen, normalized=True))
            # XLA rounds the normalised x to bfloat16, which can swap experts with close scores.
            return jnp.sort(routed.experts, axis=-1), routed.probabilities, routed.inputs.array

        yield f"router {features}x{experts}, {chosen} of {rows} rows, {dtype}", route, route, (inputs, kernel)

    for rows, repeats in [(6, 1), (6, 3)]:
        rng = np.random.default_rng(repeats)
        each = [random_weight(300, 700, 8) for _ in range(4)]
        weight = NestedExperts(
            *(np.stack([getattr(w, a) for w in each]) for a in ("planes", "scales")), 300, 700
        )
        x = jnp.asarray(rng.standard_normal((rows // repeats, 300)), jnp.bfloat16)
        squares = rng.uniform(0.5, 2, (rows, 1)).astype(np.float32)
        thresholds = np.sort(rng.uniform(0, 1.5, (rows // repeats, 4)), axis=1).astype(np.float32)
        arguments = Activations.of(x, squares, repeats=repeats), weight, rng.integers(0, 4, rows, np.int32)
        yield (
            f"products of {rows} rows with their experts, {repeats} for a token",
            lambda *a: experts_kernel.partial_sums(*a)[0].array,
            lambda *a: experts_reference.partial_sums(*a)[0].array,
            (*arguments, thresholds),
        )

    yield (
        "dequantization of experts",
        dequantization.dequantize_to_bfloat16,
        lambda weight: jnp.stack([codes.dequantize(weight.expert(e), dtype=jnp.bfloat16) for e in range(4)]),
        (dataclasses.replace(weight, out_features=696),),
    )
    for count, sizes, transposed in [
        (150, grouped.Tiling(64, 64, 4), False),
        (700, grouped.Tiling(128, 64, 3), True),
        (129, grouped.Tiling(64, 192, 2), False),
    ]:
        rng = np.random.default_rng(count)
        rows, kernel = rng.standard_normal((count, 256)), rng.standard_normal((4, 256, 192))
        kernel = kernel.transpose(0, 2, 1) if transposed else kernel
        of = rng.choice([0, 2, 3, 4], count).astype(np.int32)  # Expert 4 is outside of the group.
        yield (
            f"product of {count} rows with their experts' kernels, {sizes}, transposed: {transposed}",
            lambda *a, s=sizes, t=transposed: grouped.grouped_product(*a, 5, t, sizes=s),
            lambda *a, t=transposed: expert_products._product(*a, 5, t),
            (jnp.asarray(rows, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16), of),
        )

    rng = np.random.default_rng(0)
    gate_up = Activations.sums(jnp.asarray(rng.standard_normal((3, 2, 1, 4, 1024)), jnp.float32), 600)
    probabilities = rng.uniform(0.01, 1, (2, 1, 4)).astype(np.float32)
    yield (
        "SwiGLU of experts",
        lambda *a: decode_rows.swiglu_experts(*a).array,
        lambda gate_up, p: gated_mlp.gated_experts(gate_up.astype(jnp.float32), p).array,
        (gate_up.astype(jnp.bfloat16), probabilities),
    )


def attention_cases() -> Iterator[Case]:
    """One and several new tokens, all head sizes, and all options of a layer."""
    everything = {"window": 100, "score_soft_cap": 20.0, "score_scale": 0.1}
    for name, heads, kv_heads, dim, tokens, options, lengths in [
        ("Qwen3-8B", 8, 2, 128, 1, {}, (299,)),
        ("Qwen3-8B", 4, 2, 128, 1, {}, (0, 130, 303)),
        ("Llama-3.2-1B", 8, 2, 64, 1, {}, (37, 1)),
        ("Llama-3.1-8B", 5, 1, 128, 1, {}, (260,)),
        ("Qwen3-8B", 8, 1, 256, 1, everything, (250, 3)),
        ("Llama-3.1-8B", 3, 1, 80, 1, {"window": 50}, (130,)),
        ("Qwen3-8B", 8, 2, 128, 4, {}, (0, 130, 300)),
        ("Qwen3-8B", 6, 2, 96, 6, everything, (240, 1)),
        ("Llama-3.1-8B", 8, 1, 64, 16, {}, (0, 288)),
        ("Llama-3.1-8B", 2, 2, 80, 3, {"window": 20}, (290,)),
        ("Qwen3-8B", 4, 1, 256, 9, {}, (200, 14)),
    ]:
        config = dataclasses.replace(
            random_model.shape(name), num_heads=heads, num_kv_heads=kv_heads, head_dim=dim
        )
        spec, rng = dataclasses.replace(config.layers[0].attention, **options), np.random.default_rng(heads)
        qkv, norms = rng.standard_normal((len(lengths), tokens, (heads + 2 * kv_heads) * dim)), None
        cache = [rng.standard_normal((len(lengths), CAPACITY, kv_heads, dim)) for _ in range(2)]
        if config.layers[0].attention.head_norms:
            norms = tuple(jnp.asarray(rng.uniform(0.5, 1.5, dim), jnp.bfloat16) for _ in range(2))
        positions = np.asarray(lengths, np.int32)[:, None] + np.arange(tokens, dtype=np.int32)
        qkv, cache = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (qkv, KeyValues(*cache)))

        def attend(*arguments, config=config, spec=spec, ends=positions[:, -1] + 1):
            outputs, cache = attention.attend_heads(config, spec, *arguments)
            # XLA clears the slots after several new tokens.
            used = (jnp.arange(CAPACITY) < ends[:, None])[..., None, None]
            rows = cache.contiguous(jnp.full(len(ends), CAPACITY))[:2]
            return outputs.array, *(jnp.where(used, array, 0) for array in rows)

        case = f"attention {tokens} x {heads}/{kv_heads} heads of {dim}, {options}, lengths {lengths}"
        arguments = Activations.of(qkv), norms, positions, cache
        yield case, attend, attend, arguments
        pages = KeyValues(
            *(array.reshape(-1, PAGE_SIZE, kv_heads, dim) for array in cache[:2]),
            jnp.asarray(rng.permutation(len(lengths) * CAPACITY // PAGE_SIZE).reshape(len(lengths), -1)),
        )
        arguments = Activations.of(qkv), norms, positions, pages
        yield f"{case} in pages", attend, attend, arguments


def dequantization_cases() -> Iterator[Case]:
    for k, n, max_bits in [(256, 1024, 8), (300, 1000, 8), (130, 520, 4)]:
        weight = random_weight(k, n, max_bits)
        yield (
            f"dequantization {k}x{n}, {max_bits} bits",
            dequantization.dequantize_to_bfloat16,
            lambda weight: codes.dequantize(weight, dtype=jnp.bfloat16),
            (weight,),
        )


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Returns ``||got - expected|| / ||expected||`` in float64."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def main() -> None:
    cpu = jax.devices("cpu")[0]
    # Inputs are made on the CPU, so the GPU runs only the kernels and the operations around them.
    with jax.default_device(cpu):
        makers = (
            *(matvec_cases, level_matmul_cases, rows_cases, mixture_cases, attention_cases),
            *(dequantization_cases, sampling_cases),
        )
        cases = [case for make in makers for case in make()]
    for name, kernel, reference_function, arguments in cases:
        arguments = jax.tree.map(np.asarray, arguments)
        with jax.default_device(cpu):
            expected = jax.tree.leaves(jax.device_get(jax.jit(reference_function)(*arguments)))
        got = jax.tree.leaves(jax.device_get(jax.jit(kernel)(*arguments)))
        error = max(map(relative_error, got, expected))
        print(f"{name}: {error:.1e}", flush=True)
        if not error < TOLERANCE:
            raise SystemExit(f"{name}: relative error {error:.1e}, expected less than {TOLERANCE:g}")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
