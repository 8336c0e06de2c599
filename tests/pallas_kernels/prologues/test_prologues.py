"""Products that compute their row in the prologue have the bits of separate launches, on the emulator."""

import dataclasses

import emulated_launch
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from matvec_cases import Case

from pallas_kernels import Activations, NestedWeight, decode_rows, grading, prologues
from pallas_kernels.decode_attention import kernel as attention
from pallas_kernels.decode_attention.deferred import AttentionSource
from pallas_kernels.decode_attention.lane_context import Shape
from pallas_kernels.decode_rows import kernel as rows_kernel
from pallas_kernels.lanes import device
from pallas_kernels.matvec.mosaic_gpu import Config
from pallas_kernels.matvec.mosaic_gpu import kernel as matvec
from pallas_kernels.prologues import Deferred
from pallas_kernels.prologues import kernel as prologue_kernel

BUILDERS = (
    attention._merge_kernel,
    rows_kernel._swiglu_kernel,
    matvec._matvec_kernel,
    prologue_kernel._kernel,
)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    """Replaces the launches by the emulator."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, rows_kernel, matvec, prologue_kernel):
            patch.setattr(module, "lane_kernel", emulated_launch.lane_kernel)
        patch.setattr(device, "unsupported_reason", lambda *oldest: None)
        for build in BUILDERS:
            build.cache_clear()
        yield
    for build in BUILDERS:
        build.cache_clear()


def attention_row(rng, kv_heads: int, queries: int, head_dim: int, splits: int, sinks: bool) -> Deferred:
    """Random results of the splits. Some splits have no position, as at the start of a text."""
    shape = Shape(
        batch=1,
        kv_heads=kv_heads,
        queries_per_kv=queries,
        head_dim=head_dim,
        capacity=64,
        splits=splits,
        eps=None,
        num_partials=1,
        stored_features=(queries + 2) * kv_heads * head_dim,
        has_sinks=sinks,
    )
    leading = (1, kv_heads, splits, queries)
    sums = rng.uniform(1, 9, leading)
    softmax = np.stack([4 * rng.standard_normal(leading), sums], axis=-1)
    accumulators = rng.standard_normal((*leading, head_dim)) * sums[..., None]
    empty = rng.random(splits) < 0.3
    empty[0] = False
    softmax[:, :, empty] = [-1e30, 0]
    accumulators[:, :, empty] = 0
    arrays = [accumulators, softmax, *([rng.uniform(-1, 3, kv_heads * queries)] if sinks else [])]
    arrays = tuple(jnp.asarray(array, jnp.float32) for array in arrays)
    return Deferred(arrays, AttentionSource(shape), attention._finish)


def swiglu_row(rng, features: int, partials: int) -> Deferred:
    """Random partial sums of gate and up, NaN in the padding."""
    sums = np.full((partials, 1, 1, -(-2 * features // 64) * 64), np.nan, np.float32)
    sums[..., : 2 * features] = rng.standard_normal((partials, 1, 1, 2 * features))
    return decode_rows.defer_swiglu(Activations.sums(jnp.asarray(sums), 2 * features).astype(jnp.bfloat16))


def product_arguments(row: Deferred, outputs: int, max_bits: int, seed: int):
    """Returns a random weight for a row, and thresholds that are reached by some of its channels."""
    _, weight, _ = Case(row.features, outputs, max_bits=max_bits, seed=seed).arrays()
    weight = NestedWeight(
        *map(jnp.asarray, (weight.planes, weight.scales)),
        weight.in_features,
        weight.out_features,
        jnp.asarray(weight.level_gains),
    )
    magnitudes = np.abs(np.asarray(row.array, np.float32)).ravel()
    chosen = np.sort(np.random.default_rng(seed).choice(magnitudes, weight.num_planes))
    return weight, jnp.asarray(chosen).reshape(1, 1, -1)


def check_bits(row: Deferred, outputs: int, max_bits: int, config: Config | None, seed: int) -> None:
    weight, thresholds = product_arguments(row, outputs, max_bits, seed)
    y, parts = prologues.partial_sums(row, weight, thresholds, config=config)
    stats = grading.added_up({"layer": parts})["layer"]
    finished = row.finished().reshape((-1,))
    expected, expected_stats = matvec.partial_sums(finished, weight, thresholds[0], config=config)
    np.testing.assert_array_equal(y.partials[:, 0], expected.partials)
    np.testing.assert_array_equal(stats.packed[0], expected_stats.packed)


configs = st.builds(
    Config,
    warpgroups=st.sampled_from([1, 2]),
    warps_per_group=st.sampled_from([1, 2, 4]),
    ring_slots=st.sampled_from([2, 8]),
)
outputs = st.integers(1, 600)
max_bits = st.sampled_from([2, 4, 6, 8])
seeds = st.integers(0, 2**32 - 1)


@given(
    kv_heads=st.integers(1, 3),
    queries=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    splits=st.integers(1, 5),
    sinks=st.booleans(),
    outputs=outputs,
    max_bits=max_bits,
    config=configs,
    seed=seeds,
)
@examples(12, in_ci=200)
def test_merge_of_attention(kv_heads, queries, head_dim, splits, sinks, outputs, max_bits, config, seed):
    rng = np.random.default_rng(seed)
    row = attention_row(rng, kv_heads, queries, head_dim, splits, sinks)
    check_bits(row, outputs, max_bits, config, seed)


@given(
    features=st.integers(1, 350),
    partials=st.integers(1, 4),
    outputs=outputs,
    max_bits=max_bits,
    config=configs,
    seed=seeds,
)
@examples(12, in_ci=200)
def test_swiglu(features, partials, outputs, max_bits, config, seed):
    row = swiglu_row(np.random.default_rng(seed), 2 * features, partials)
    check_bits(row, outputs, max_bits, config, seed)


def test_a_row_wider_than_all_counting_ctas_have_threads():
    """K = 12,288, as in ``down`` of Qwen3-8B: each thread counts several channels."""
    config = Config(warpgroups=1, warps_per_group=1, ring_slots=2)
    check_bits(swiglu_row(np.random.default_rng(0), 12288, 2), 64, 8, config, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_reach_the_outputs_and_the_statistics(bad):
    row = swiglu_row(np.random.default_rng(1), 256, 2)
    (partials,) = row.arrays
    row = dataclasses.replace(row, arrays=(partials.at[0, 0, 300].set(bad),))
    weight, thresholds = product_arguments(swiglu_row(np.random.default_rng(1), 256, 2), 64, 8, 0)
    y, parts = prologues.partial_sums(row, weight, thresholds)
    assert not np.isfinite(y.array).any()
    assert not np.isfinite(grading.added_up({"layer": parts})["layer"].max_abs).any()


def test_another_width_is_refused():
    row = swiglu_row(np.random.default_rng(2), 256, 1)
    weight = NestedWeight.abstract(128, 64)
    assert prologues.supports(row, weight) == "takes 128 features, not 256"
