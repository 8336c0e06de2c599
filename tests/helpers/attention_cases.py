"""Inputs of the lane programs of decode attention, a float64 oracle, and the programs on the emulator."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import kernel
from pallas_kernels.decode_attention.lane_context import THREADS, Refs, Shape
from pallas_kernels.decode_attention.merging import MergeRefs, merge_program
from pallas_kernels.decode_attention.new_tokens import PREPARE_THREADS, prepare_blocks, prepare_program
from pallas_kernels.decode_attention.program import attention_program, several_tokens_program
from pallas_kernels.lanes.emulator import NumpyInstructions

STORED_SIZES = {"num_partials": 3, "stored_features": 2048}
SHARED_BYTES_OF_ALL_GPUS = 99 << 10
"""Shared memory of a CTA on the supported GPUs with the least of it: compute capability 8.6, 8.9 and 12.0."""


def as_bfloat16(x) -> np.ndarray:
    return np.array(jnp.asarray(x, jnp.bfloat16))


def inputs(shape: Shape, lengths, seed: int = 0, angles_of=None) -> dict[str, np.ndarray]:
    """Returns arrays of ``Refs`` by name. Cache slots from the length on hold huge numbers."""
    rng = np.random.default_rng((shape.capacity, seed))
    positions = np.asarray(lengths)[:, None] + np.arange(shape.tokens)
    angles = positions.reshape(-1, 1) * rng.uniform(0, 1, shape.head_dim // 2)
    cache = (shape.batch, shape.capacity, shape.kv_heads, shape.head_dim)
    keys, values = (as_bfloat16(rng.standard_normal(cache, np.float32)) for _ in range(2))
    for b, length in enumerate(lengths):
        keys[b, length:] = values[b, length:] = 1e30
        keys[b, 0] = keys[b, 0] if length else 0  # The kernel loads position 0 and must ignore it.
        values[b, 0] = values[b, 0] if length else 0
    partials, tokens = shape.num_partials, shape.batch * shape.tokens
    qkv = np.full((partials, tokens, shape.stored_features), np.nan, np.float32)
    row = (shape.queries_per_kv + 2) * shape.kv_heads * shape.head_dim
    qkv[:, :, :row] = rng.standard_normal((partials, tokens, row)) / partials**0.5
    arrays = {
        "qkv": qkv,
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "q_scale": as_bfloat16(rng.standard_normal(shape.head_dim)),
        "k_scale": as_bfloat16(rng.standard_normal(shape.head_dim)),
        "lengths": np.asarray(lengths, np.int32),
        "keys": keys,
        "values": values,
    }
    if shape.has_sinks:
        heads = shape.kv_heads * shape.queries_per_kv
        arrays["sinks"] = rng.uniform(-1, 3, heads).astype(np.float32)
    return arrays


def oracle(shape: Shape, qkv, cos, sin, q_scale, k_scale, lengths, keys, values, sinks=None):
    """Computes outputs and cache in float64, rounded to bfloat16 where XLA's operations round.

    Returns:
      ``(outputs [B, T, heads * D], keys, values)``.
    """

    def rounded(x):
        return as_bfloat16(x).astype(np.float64)

    def normed_and_rotated(head, scale, token):
        head = head.astype(np.float64)
        if shape.eps is not None:
            head = rounded(head / np.sqrt(np.mean(head**2) + shape.eps) * scale.astype(np.float64))
        low, high = np.split(head, 2)
        c, s = cos[token], sin[token]
        return rounded(np.concatenate([low * c - high * s, high * c + low * s]))

    dim, per_kv = shape.head_dim, shape.queries_per_kv
    outputs = np.zeros((shape.batch, shape.tokens, shape.kv_heads * per_kv, dim))
    keys, values = keys.copy(), values.copy()
    factor = dim**-0.5 if shape.scale is None else shape.scale
    for b, t in np.ndindex(shape.batch, shape.tokens):
        token, position = b * shape.tokens + t, lengths[b] + t
        first = 0 if shape.window is None else max(0, position + 1 - shape.window)
        row = rounded(qkv[:, token, : (per_kv + 2) * shape.kv_heads * dim].sum(0))
        queries, rest = np.split(row.reshape(-1, dim), [per_kv * shape.kv_heads])
        for h in range(shape.kv_heads):
            key, value = normed_and_rotated(rest[h], k_scale, token), rest[shape.kv_heads + h]
            all_keys = np.vstack([keys[b, first:position, h].astype(np.float64), key])
            all_values = np.vstack([values[b, first:position, h].astype(np.float64), value])
            for i in range(h * per_kv, (h + 1) * per_kv):
                scores = all_keys @ normed_and_rotated(queries[i], q_scale, token) * factor
                if shape.soft_cap is not None:
                    scores = shape.soft_cap * np.tanh(scores / shape.soft_cap)
                sink = -np.inf if sinks is None else sinks[i]
                largest = max(scores.max(), sink)
                weights = np.exp(scores - largest)
                outputs[b, t, i] = weights @ all_values / (weights.sum() + np.exp(sink - largest))
            if position < shape.capacity:
                keys[b, position, h], values[b, position, h] = key, value
    return outputs.reshape(shape.batch, shape.tokens, -1), keys, values


def emulated(shape: Shape, arrays: dict[str, np.ndarray], pages=None) -> np.ndarray:
    """Runs all launches on the emulator. Updates the cache in ``arrays``; returns ``[B, T, heads * D]``."""
    return merged(shape, partial_results(shape, arrays, pages), arrays.get("sinks"))


def partial_results(shape: Shape, arrays: dict[str, np.ndarray], pages=None) -> dict[str, np.ndarray]:
    """Runs all launches but the last; returns accumulators and softmaxes of all splits (see ``Refs``)."""
    arrays = arrays if pages is None else arrays | {"pages": pages}
    cache = {name: arrays[name] for name in ("lengths", "keys", "values", "pages") if name in arrays}
    heads = {name: arrays[name] for name in kernel.HEAD_INPUTS}
    dim, program = shape.head_dim, attention_program
    if shape.tokens > 1:
        new = (shape.batch, shape.tokens, shape.kv_heads, dim)
        sizes = ((shape.batch, shape.kv_heads, shape.rows, dim), new, new)
        prepared = [np.full(size, np.nan, jnp.bfloat16) for size in sizes]
        outputs = dict(zip(kernel.PREPARED, prepared, strict=True))
        launch(prepare_program, shape, heads | cache | outputs, prepare_blocks(shape), PREPARE_THREADS, 0)
        heads, program = outputs, several_tokens_program
    leading = (shape.batch, shape.kv_heads, shape.splits, shape.rows)
    results = [np.full((*leading, last), np.nan, np.float32) for last in (dim, 2)]
    results = dict(zip(kernel.PARTIAL_RESULTS, results, strict=True))
    assert shape.shared_bytes <= SHARED_BYTES_OF_ALL_GPUS
    launch(program, shape, heads | cache | results, shape.blocks, THREADS, shape.shared_bytes)
    return results


def merged(shape: Shape, results: dict[str, np.ndarray], sinks=None) -> np.ndarray:
    """Runs the last launch; returns ``[B, T, heads * D]``."""
    rows = kernel.merged_rows(shape)
    isa = NumpyInstructions(blocks=rows.blocks, threads=rows.threads, shared_bytes=rows.shared_bytes)
    outputs = np.full((rows.rows, rows.features), np.nan, jnp.bfloat16)
    refs = results | {"outputs": outputs} | ({"sinks": sinks} if shape.has_sinks else {})
    refs = {name: isa.array(array) for name, array in refs.items()}
    merge_program(isa, shape, rows, MergeRefs(**refs, shared=None))
    isa.finish()
    return outputs.astype(np.float32).reshape(shape.batch, shape.tokens, -1)


def launch(program, shape: Shape, arrays, blocks: int, threads: int, shared_bytes: int) -> None:
    """Runs one launch on the emulator."""
    isa = NumpyInstructions(blocks=blocks, threads=threads, shared_bytes=shared_bytes)
    program(isa, shape, Refs(**{name: isa.array(array) for name, array in arrays.items()}))
    isa.finish()


def check(outputs, cache, expected, expected_cache) -> None:
    """Compares with the oracle's results."""
    np.testing.assert_allclose(outputs, expected, atol=6e-3 * np.abs(expected).max())
    keys, values = (a.astype(np.float32) for a in cache)
    expected_keys, expected_values = (a.astype(np.float32) for a in expected_cache)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_allclose(keys, expected_keys, rtol=2**-7, atol=1e-6)


def one_by_one(shape: Shape, arrays: dict[str, np.ndarray], pages=None) -> dict[str, np.ndarray]:
    """Runs the tokens of each sequence one after another; otherwise as ``partial_results``."""
    alone, steps = dataclasses.replace(shape, tokens=1), []
    for t in range(shape.tokens):
        mine = np.arange(shape.batch) * shape.tokens + t
        step = arrays | {
            "qkv": np.ascontiguousarray(arrays["qkv"][:, mine]),
            "cos": arrays["cos"][mine],
            "sin": arrays["sin"][mine],
            "lengths": arrays["lengths"] + np.int32(t),
        }
        steps.append(partial_results(alone, step, pages))
    # Query rows are ordered by token, then by head.
    return {name: np.concatenate([step[name] for step in steps], axis=3) for name in kernel.PARTIAL_RESULTS}


def assert_same_bits(results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compares partial results, which are float32: outputs, which are rounded to bfloat16, hide much."""
    for name in kernel.PARTIAL_RESULTS:
        np.testing.assert_array_equal(results[name], expected[name], err_msg=name)


def in_pages(shape: Shape, arrays, lengths, rng):
    """Moves the cache to random pages of a larger pool; returns the arrays and the page table.

    Pages that the new tokens do not reach, and those before the window, are missing from the table. The rest
    of the pool is NaN.
    """
    pages_per_row = shape.capacity // shape.page_size
    table = rng.permutation(shape.num_pages)[: shape.batch * pages_per_row].reshape(shape.batch, -1)
    pools = []
    for name in ("keys", "values"):
        pool = np.full(
            (shape.num_pages, shape.page_size, *arrays[name].shape[2:]), np.nan, arrays[name].dtype
        )
        pool[table] = arrays[name].reshape(*table.shape, shape.page_size, *arrays[name].shape[2:])
        pools.append(pool)
    lengths = np.asarray(lengths)[:, None]
    needed = np.arange(pages_per_row) <= (lengths + shape.tokens - 1) // shape.page_size
    if shape.window is not None:
        first = np.maximum(np.minimum(lengths + 1 - shape.window, lengths - 1), 0)
        needed &= np.arange(pages_per_row) >= first // shape.page_size
    table = np.where(needed, table, shape.num_pages)
    return arrays | dict(zip(("keys", "values"), pools, strict=True)), table.astype(np.int32)
