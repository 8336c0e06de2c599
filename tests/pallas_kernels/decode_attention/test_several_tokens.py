"""Decode attention for several new tokens, other head sizes and options, on the emulator.

Each case compares with a float64 oracle, and bitwise with the tokens one after another.
"""

import numpy as np
import pytest
from attention_cases import (
    STORED_SIZES,
    assert_same_bits,
    check,
    emulated,
    in_pages,
    inputs,
    merged,
    one_by_one,
    oracle,
    partial_results,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from pallas_kernels.decode_attention import kernel
from pallas_kernels.decode_attention.lane_context import Shape

WIDE = {"num_partials": 2, "stored_features": 2560}


def shape_of(**sizes) -> Shape:
    defaults = {"batch": 1, "kv_heads": 1, "queries_per_kv": 2, "head_dim": 64, "splits": 2, "eps": 1e-6}
    stored = STORED_SIZES if sizes.get("head_dim", 64) < 256 else WIDE
    return Shape(**(defaults | stored | sizes))


def copied(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def check_both_ways(shape: Shape, lengths, seed: int = 0) -> None:
    """Compares all tokens at once with the oracle, and bitwise with one token after another."""
    arrays = inputs(shape, lengths, seed)
    expected, *expected_cache = oracle(shape, **arrays)
    together, apart = copied(arrays), copied(arrays)
    results = partial_results(shape, together)
    outputs = merged(shape, results, arrays.get("sinks"))
    check(outputs, (together["keys"], together["values"]), expected, expected_cache)
    if shape.tokens == 1:
        return
    assert_same_bits(results, one_by_one(shape, apart))
    for name in ("keys", "values"):
        np.testing.assert_array_equal(together[name].view(np.uint16), apart[name].view(np.uint16))


@pytest.mark.parametrize("head_dim", [80, 96, 256])
def test_head_sizes(head_dim):
    check_both_ways(shape_of(head_dim=head_dim, capacity=160, queries_per_kv=3), [141])


@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
def test_tokens_of_every_head_size(head_dim):
    """6 tokens of 3 heads: 18 query rows, in three octets, or, for the largest heads, in two CTAs."""
    shape = shape_of(head_dim=head_dim, capacity=176, tokens=6, queries_per_kv=3, splits=3)
    assert shape.row_groups == (2 if head_dim == 256 else 1)
    check_both_ways(shape, [130])


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 50},
        {"window": 300, "scale": 0.2},
        {"soft_cap": 2.0},
        {"has_sinks": True},
        {"window": 70, "soft_cap": 5.0, "scale": 0.3, "has_sinks": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 4])
def test_options(options, tokens):
    check_both_ways(shape_of(capacity=448, tokens=tokens, splits=1, **options), [420])


def test_sixteen_tokens_of_eight_heads_and_two_sequences():
    """128 query rows: two CTAs for each split. One sequence is short, another fills its cache."""
    shape = shape_of(batch=2, capacity=48, tokens=16, queries_per_kv=8)
    assert (shape.octets, shape.row_groups) == (8, 2)
    check_both_ways(shape, [3, 32])


def test_tokens_beyond_the_capacity_change_nothing():
    """Three of five tokens have a slot. Their outputs are those without the other two."""
    shape = shape_of(batch=2, capacity=40, tokens=5)
    arrays = inputs(shape, [37, 12])
    expected, *expected_cache = oracle(shape, **arrays)
    outputs = emulated(shape, arrays)
    check(outputs[:, :3], (arrays["keys"], arrays["values"]), expected[:, :3], expected_cache)
    assert np.isfinite(outputs).all()


@examples(6)
@given(st.data())
def test_outputs_depend_on_the_position_alone(data):
    """Pages, other sequences, number of tokens and of splits of a CTA: the bits of a token stay the same."""
    page_size = data.draw(st.sampled_from([8, 16, 24]), "page size")
    pages_per_row = data.draw(st.integers(2, 192 // page_size), "pages per row")
    batch = data.draw(st.integers(1, 3), "batch")
    tokens = data.draw(st.integers(2, 6), "tokens")
    splits, splits_per_block = data.draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]), "splits")
    capacity = page_size * pages_per_row
    all_lengths = st.lists(st.integers(0, capacity - tokens), min_size=batch, max_size=batch)
    lengths = data.draw(all_lengths, "lengths")
    options = {
        "window": data.draw(st.sampled_from([None, None, 1, 20, 130]), "window"),
        "soft_cap": data.draw(st.sampled_from([None, 3.0]), "soft cap"),
        "has_sinks": data.draw(st.booleans(), "sinks"),
    }
    sizes = {
        "kv_heads": data.draw(st.integers(1, 2), "kv heads"),
        "queries_per_kv": data.draw(st.integers(1, 4), "queries per kv head"),
        "head_dim": data.draw(st.sampled_from([64, 80]), "head size"),
        "capacity": capacity,
        "splits": splits,
        "tokens": tokens,
    }
    seed = data.draw(st.integers(0, 2**16), "seed")
    rng = np.random.default_rng(seed)
    contiguous_shape = shape_of(batch=batch, **sizes, **options)
    contiguous = inputs(contiguous_shape, lengths, seed)
    expected, *_ = oracle(contiguous_shape, **contiguous)

    paged_sizes = {"page_size": page_size, "num_pages": batch * pages_per_row + 2}
    paged_sizes["shared_limit"] = data.draw(
        st.sampled_from([0, 64 << 10, kernel.SPLIT_CONFIG.shared_limit]), "limit"
    )
    shape = shape_of(batch=batch, **sizes, **options, **paged_sizes, splits_per_block=splits_per_block)
    arrays, table = in_pages(shape, contiguous, lengths, rng)
    results = partial_results(shape, arrays, table)
    outputs = merged(shape, results, arrays.get("sinks"))
    np.testing.assert_allclose(outputs, expected, atol=6e-3 * np.abs(expected).max())

    row = data.draw(st.integers(0, batch - 1), "row")
    alone = shape_of(batch=1, **sizes, **options)
    mine = slice(row * tokens, (row + 1) * tokens)
    one = {
        name: array[row : row + 1] if name in ("lengths", "keys", "values") else array
        for name, array in contiguous.items()
    }
    one |= {name: contiguous[name][mine] for name in ("cos", "sin")} | {"qkv": contiguous["qkv"][:, mine]}
    of_row = {name: array[row : row + 1] for name, array in results.items()}
    assert_same_bits(of_row, one_by_one(alone, copied(one)))


def test_a_sequence_without_pages_changes_nothing():
    """The row of an empty slot has no page, and a row may lack pages for its last new tokens."""
    shape = shape_of(batch=3, capacity=64, tokens=4, page_size=16, num_pages=15)
    lengths = [0, 40, 30]
    contiguous = inputs(shape, lengths)
    expected, *_ = oracle(shape, **contiguous)
    arrays, table = in_pages(shape, contiguous, lengths, np.random.default_rng(0))
    table[0] = shape.num_pages
    table[2, 2:] = shape.num_pages
    written = [table[1, 40 // 16], table[2, 30 // 16]]
    before = [arrays[name].copy() for name in ("keys", "values")]
    outputs = emulated(shape, arrays, table)
    for row, count in ((1, 4), (2, 2)):
        error = np.abs(outputs[row, :count] - expected[row, :count]).max()
        assert error <= 6e-3 * np.abs(expected).max()
    for name, old in zip(("keys", "values"), before, strict=True):
        changed = (arrays[name].view(np.uint16) != old.view(np.uint16)).any(axis=(2, 3))
        pages, slots = np.nonzero(changed)
        assert sorted(set(pages)) == sorted(written)
        assert len(slots) == 4 + 2


@pytest.mark.parametrize(
    ("length", "tokens", "options"),
    [
        (32_000, 2, {}),
        pytest.param(131_000, 1, {"window": 1024}, marks=pytest.mark.slow),
        pytest.param(131_000, 16, {}, marks=pytest.mark.slow),
    ],
)
def test_long_contexts(length, tokens, options):
    """One kv head has 128 splits. Most keys are nearly orthogonal to the queries, and a few count."""
    capacity = length + 72
    sizes = kernel.cache_sizes((1, capacity, 1, 64), None)
    shape = shape_of(tokens=tokens, **options, **sizes)
    assert shape.splits == 128
    check_both_ways(shape, [length])


def test_offsets_of_the_longest_contexts_fit():
    """64 sequences of 131,072 positions, 16 new tokens each: offsets that are computed in 32 bits."""
    cache = (64, 131_072, 8, 128)
    shape = shape_of(
        batch=64,
        tokens=16,
        kv_heads=8,
        queries_per_kv=4,
        **kernel.cache_sizes(cache, None) | {"head_dim": 128},
    )
    assert shape.batch * shape.capacity * shape.kv_heads < 2**31
    partial_bytes = 4 * shape.batch * shape.kv_heads * shape.splits * shape.rows * shape.head_dim
    assert partial_bytes == 256 << 20
    assert partial_bytes <= kernel.MAX_PARTIAL_BYTES
