"""CTAs whose warps divide the shares of several splits, on the emulator.

Each row has the bits that it has with one split for each CTA, as in a batch of one.
"""

import dataclasses

import numpy as np
import pytest
from attention_cases import (
    STORED_SIZES,
    assert_same_bits,
    in_pages,
    inputs,
    merged,
    oracle,
    partial_results,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from pallas_kernels.decode_attention import kernel
from pallas_kernels.decode_attention.cached_positions import CachedPositions
from pallas_kernels.decode_attention.lane_context import THREADS, WARPS, Shape, lane_context
from pallas_kernels.decode_attention.shares import Shares
from pallas_kernels.lanes.emulator import NumpyInstructions

SIZES = {"batch": 1, "kv_heads": 1, "queries_per_kv": 2, "head_dim": 64, "eps": 1e-6} | STORED_SIZES
WIDE = {"head_dim": 256, "num_partials": 2, "stored_features": 2560}


def shape_of(**sizes) -> Shape:
    return Shape(**(SIZES | {"shared_limit": kernel.SPLIT_CONFIG.shared_limit} | sizes))


def check_shares(shape: Shape, lengths, rng=None) -> None:
    """Compares with the oracle, and bitwise with the launch in which each CTA has one split.

    Both launches read the pages of a cache, at different places, if the shape has pages.
    """
    assert shape.divides_shares
    plain = dataclasses.replace(shape, page_size=None)
    arrays = inputs(plain, lengths)
    expected, *_ = oracle(plain, **arrays)
    results = []
    for one in (shape, dataclasses.replace(shape, splits_per_block=1, shared_limit=0)):
        copies, table = {name: array.copy() for name, array in arrays.items()}, None
        if shape.page_size is not None:
            copies, table = in_pages(one, copies, lengths, rng)
        results.append(partial_results(one, copies, table))
    assert_same_bits(*results)
    outputs = merged(shape, results[0], arrays.get("sinks"))
    np.testing.assert_allclose(outputs, expected, atol=6e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        (
            {"batch": 2, "splits": 8, "splits_per_block": 8, "capacity": 720},
            [0, 700],
        ),  # Six shares, two rounds.
        # The second share of six of the splits has no positions, and a warp goes on to another share.
        ({"splits": 8, "splits_per_block": 8, "capacity": 160}, [130]),
        ({"splits": 2, "splits_per_block": 2, "capacity": 600, "queries_per_kv": 8}, [590]),  # Three steps.
        ({"splits": 4, "splits_per_block": 2, "capacity": 720, "window": 70}, [700]),
        ({"splits": 2, "splits_per_block": 2, "capacity": 80, "queries_per_kv": 4, **WIDE}, [70]),
        ({"splits": 2, "splits_per_block": 2, "capacity": 160, "head_dim": 80, "soft_cap": 3.0}, [150]),
        ({"splits": 4, "splits_per_block": 4, "capacity": 160, "tokens": 6}, [140]),  # Two octets of rows.
    ],
    ids=str,
)
def test_a_row_has_the_bits_of_one_split_for_each_cta(sizes, lengths):
    check_shares(shape_of(**sizes), lengths)


@examples(8)
@given(st.data())
def test_bits_depend_on_the_row_alone(data):
    """Lengths with one to eight shares, two to eight splits, one to four rounds, pages and windows."""
    splits, per_block = data.draw(st.sampled_from([(2, 2), (4, 4), (8, 4), (6, 6), (8, 8)]), "splits")
    page_size = data.draw(st.sampled_from([None, 8, 24]), "page size")
    capacity = 24 * data.draw(st.integers(1, splits * 6), "capacity")
    batch, tokens = data.draw(st.integers(1, 2), "batch"), data.draw(st.integers(1, 2), "tokens")
    row_lengths = st.integers(0, max(0, capacity - tokens))
    shape = shape_of(
        batch=batch,
        tokens=tokens,
        splits=splits,
        splits_per_block=per_block,
        capacity=capacity,
        page_size=page_size,
        num_pages=0 if page_size is None else batch * capacity // page_size + 2,
        window=data.draw(st.sampled_from([None, None, 1, 40, 300]), "window"),
        shared_limit=data.draw(st.sampled_from([24 << 10, 36 << 10, 99 << 10]), "limit"),
        same_share=data.draw(st.booleans(), "same share"),
    )
    lengths = data.draw(st.lists(row_lengths, min_size=batch, max_size=batch), "lengths")
    check_shares(shape, lengths, np.random.default_rng(data.draw(st.integers(0, 99), "seed")))


def test_long_caches_have_the_same_share_of_neighbouring_splits():
    sizes = [kernel.cache_sizes((8, capacity, 8, 128), None) for capacity in (1088, 4160)]
    assert [each["same_share"] for each in sizes] == [False, True]


@pytest.mark.parametrize("length", [0, 1, 100, 1024, 1056, 2100])
@pytest.mark.parametrize("batch", [2, 8, 16])
@pytest.mark.parametrize("same_share", [False, True])
def test_warps_have_equal_work_and_cover_every_position(batch, length, same_share):
    """The steps of all warps, followed as the program follows them, on the sizes of Qwen3-8B."""
    cache = kernel.cache_sizes((batch, 2304, 8, 128), None)
    shape = shape_of(
        batch=1, kv_heads=1, queries_per_kv=4, **(cache | {"head_dim": 128, "same_share": same_share})
    )
    isa = NumpyInstructions(blocks=shape.blocks, threads=THREADS, shared_bytes=0)
    context = lane_context(isa, shape)
    positions = CachedPositions(isa, shape, None, isa.constant(length), isa.constant(length), None, None, [])
    shares = Shares.create(isa, shape, context, positions)
    place, steps, first_lanes = shares.first_place(), [], context.lane.data == 0
    while True:
        exists = (place.index.data < shares.count.data) & (place.round.data < shares.rounds.data)
        if not exists.any():
            break
        located, _ = shares.locate(place.round, place.index)
        steps.append(
            np.stack([located.split.data, located.warp.data, place.step.data], 1)[exists & first_lanes]
        )
        place = shares.after(place)
    visited = np.concatenate(steps) if steps else np.zeros((0, 3), int)
    assert len(np.unique(visited, axis=0)) == len(visited)
    first = visited[:, 2] * 128 + visited[:, 1] * 16
    covered = ((first[:, None] + np.arange(16)) * shape.splits + visited[:, :1]).reshape(-1)
    np.testing.assert_array_equal(np.sort(covered[covered < length]), np.arange(length))
    if length == 1024:  # 4 shares of one step in each split.
        assert len(steps) == max(1, shape.splits_per_block * 4 // WARPS)
