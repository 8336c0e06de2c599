"""The lane programs of decode attention on the emulator, against a float64 oracle."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import STORED_SIZES, check, emulated, in_pages, inputs, oracle
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from pallas_kernels.decode_attention import kernel
from pallas_kernels.decode_attention.lane_context import Shape

CASES = {  # sizes, lengths
    "empty cache": (
        {
            "batch": 1,
            "kv_heads": 1,
            "queries_per_kv": 2,
            "head_dim": 128,
            "capacity": 64,
            "splits": 2,
            "eps": 1e-6,
        },
        [0],
    ),
    "four heads per kv head": (
        {
            "batch": 1,
            "kv_heads": 2,
            "queries_per_kv": 4,
            "head_dim": 128,
            "capacity": 300,
            "splits": 3,
            "eps": 1e-6,
        },
        [299],
    ),
    "batch, narrow heads, one cache full": (
        {
            "batch": 2,
            "kv_heads": 2,
            "queries_per_kv": 4,
            "head_dim": 64,
            "capacity": 96,
            "splits": 2,
            "eps": None,
        },
        [96, 1],
    ),
    "odd number of heads, several steps": (
        {
            "batch": 1,
            "kv_heads": 1,
            "queries_per_kv": 5,
            "head_dim": 128,
            "capacity": 300,
            "splits": 1,
            "eps": 1e-5,
        },
        [290],
    ),
    "two to four steps in each warp": (
        {
            "batch": 2,
            "kv_heads": 1,
            "queries_per_kv": 4,
            "head_dim": 128,
            "capacity": 400,
            "splits": 1,
            "eps": 1e-6,
        },
        [390, 300],
    ),
    "a head for each warp": (
        {
            "batch": 1,
            "kv_heads": 1,
            "queries_per_kv": 6,
            "head_dim": 64,
            "capacity": 400,
            "splits": 2,
            "eps": None,
        },
        [270],
    ),
    "two heads for one warp": (
        {
            "batch": 1,
            "kv_heads": 2,
            "queries_per_kv": 7,
            "head_dim": 64,
            "capacity": 40,
            "splits": 1,
            "eps": None,
        },
        [21],
    ),
    "most heads per kv head": (
        {
            "batch": 2,
            "kv_heads": 1,
            "queries_per_kv": 8,
            "head_dim": 128,
            "capacity": 150,
            "splits": 2,
            "eps": 1e-6,
        },
        [140, 3],
    ),
    "one head per kv head": (
        {
            "batch": 1,
            "kv_heads": 2,
            "queries_per_kv": 1,
            "head_dim": 64,
            "capacity": 70,
            "splits": 4,
            "eps": 1e-6,
        },
        [65],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_programs_match_the_oracle(case):
    sizes, lengths = CASES[case]
    shape = Shape(**sizes, **STORED_SIZES)
    arrays = inputs(shape, lengths)
    expected, *expected_cache = oracle(shape, **arrays)
    outputs = emulated(shape, arrays)
    check(outputs, (arrays["keys"], arrays["values"]), expected, expected_cache)


@examples(8)
@given(st.data())
def test_pages_may_be_anywhere(data):
    """Outputs match the oracle, and are bitwise those of each row alone, with one split for each CTA."""
    page_size = data.draw(st.sampled_from([8, 16, 24, 64]), "page size")
    pages_per_row = data.draw(st.integers(1, 192 // page_size), "pages per row")
    batch = data.draw(st.integers(1, 3), "batch")
    splits, splits_per_block = data.draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 3), (4, 1)]), "splits")
    capacity = page_size * pages_per_row
    lengths = data.draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch), "lengths")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), "seed"))
    shape = Shape(
        batch=batch,
        kv_heads=data.draw(st.integers(1, 2), "kv heads"),
        queries_per_kv=data.draw(st.integers(1, 4), "queries per kv head"),
        head_dim=64,
        capacity=capacity,
        splits=splits,
        splits_per_block=splits_per_block,
        shared_limit=data.draw(
            st.sampled_from([0, 20 << 10, kernel.SPLIT_CONFIG.shared_limit]), "shared limit"
        ),
        page_size=page_size,
        num_pages=batch * pages_per_row + 2,
        eps=1e-6,
        **STORED_SIZES,
    )
    contiguous = inputs(shape, lengths)
    expected, *expected_cache = oracle(shape, **contiguous)
    arrays, table = in_pages(shape, contiguous, lengths, rng)
    before = arrays["keys"].copy()
    outputs = emulated(shape, arrays, table)
    cached = [
        np.where(
            np.isin(table, shape.num_pages)[..., None, None, None],
            contiguous[name].reshape(batch, pages_per_row, page_size, shape.kv_heads, shape.head_dim),
            arrays[name][np.minimum(table, shape.num_pages - 1)],
        ).reshape(contiguous[name].shape)
        for name in ("keys", "values")
    ]
    check(outputs, cached, expected, expected_cache)
    unused = np.setdiff1d(np.arange(shape.num_pages), table)
    assert unused.size  # The pool has more pages than the texts.
    np.testing.assert_array_equal(arrays["keys"][unused].view(np.uint16), before[unused].view(np.uint16))

    row = data.draw(st.integers(0, batch - 1), "row")
    one = slice(row, row + 1)
    alone = dataclasses.replace(shape, batch=1, splits_per_block=1, num_pages=pages_per_row + 1)
    arrays = {
        name: array[one] if name in ("cos", "sin", "lengths", "keys", "values") else array
        for name, array in contiguous.items()
    } | {"qkv": contiguous["qkv"][:, one]}
    arrays, table = in_pages(alone, arrays, lengths[one], rng)
    np.testing.assert_array_equal(emulated(alone, arrays, table)[0], outputs[row])


def test_a_row_without_pages_changes_nothing():
    """The row of an empty slot has no page. The other row is that of the same row alone."""
    sizes = {"kv_heads": 2, "queries_per_kv": 2, "head_dim": 64, "capacity": 64, "splits": 2}
    shape = Shape(batch=2, **sizes, page_size=16, num_pages=9, eps=None, **STORED_SIZES)
    contiguous = inputs(shape, [0, 40])
    expected, *_ = oracle(shape, **contiguous)
    arrays, table = in_pages(shape, contiguous, [0, 40], np.random.default_rng(0))
    written = table[1, 40 // 16]
    table[0] = shape.num_pages
    before = [arrays[name].astype(np.float32) for name in ("keys", "values")]
    outputs = emulated(shape, arrays, table)
    np.testing.assert_allclose(outputs[1], expected[1], atol=6e-3 * np.abs(expected[1]).max())
    for name, old in zip(("keys", "values"), before, strict=True):
        pool = arrays[name].astype(np.float32)
        np.testing.assert_array_equal(np.delete(pool, written, 0), np.delete(old, written, 0))
        changed = (pool[written] != old[written]).any(axis=(1, 2))
        assert changed.tolist() == [slot == 40 % 16 for slot in range(16)]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 16, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 8, 12, 40, 200])
def test_splits_of_pages_depend_on_the_model_alone(batch, kv_heads):
    sizes = kernel.cache_sizes((100, 64, kv_heads, 128), (batch, 7))
    alone = kernel.cache_sizes((3, 16, kv_heads, 128), (1, 2))
    assert kernel.cache_sizes((batch, 40, kv_heads, 128), None)["splits"] == sizes["splits"]
    assert sizes["splits"] == alone["splits"] == max(1, kernel.BLOCKS // kv_heads)
    assert sizes["splits"] % sizes["splits_per_block"] == 0
    assert alone["splits_per_block"] == 1
    per_block, sequences = sizes["splits_per_block"], batch * kv_heads
    # One wave of CTAs, unless the kv heads of the batch are more; no fewer CTAs than that needs.
    assert sequences * sizes["splits"] // per_block <= max(kernel.BLOCKS, sequences)
    for fewer in range(1, per_block):
        assert sizes["splits"] % fewer or sequences * sizes["splits"] // fewer > kernel.BLOCKS
    assert sizes["capacity"] == 7 * 64


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tokens": 17}, "takes 1 to 16 new tokens"),
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"head_dim": 48}, "heads of 64, 80, 96, 128, 256, not 48"),
        ({"heads": 18}, "at most 8 query heads for each kv head"),
        ({"batch": 2048, "tokens": 16}, "bytes of partial results, not 8589934592"),
        ({}, "needs"),  # The device is a CPU, or jax is too old.
    ],
)
def test_declines_with_a_reason(sizes, reason):
    supported = {"batch": 1, "tokens": 1, "heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": jnp.bfloat16}
    assert reason in kernel.supports(**supported | sizes)
