"""The cache: rows of a paged cache as one contiguous array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.ring_cache import SPARE_SLOTS, RingKeyValues, ring_slots


def test_pages_that_a_row_does_not_have_and_positions_behind_its_end_are_zeros():
    """Pages of other texts may hold NaN, which a weight of 0 does not remove."""
    pool = jnp.full((4, 2, 1, 3), jnp.nan).at[1].set(1.0).at[2, 0].set(2.0)
    pages = jnp.array([[1, 2, 4], [1, 4, 4]])  # Page 4 does not exist.
    keys, values, none = KeyValues(pool, -pool, pages).contiguous(jnp.array([3, 6]))
    expected = np.zeros((2, 6, 1, 3))
    expected[0, :2], expected[0, 2], expected[1, :2] = 1, 2, 1
    np.testing.assert_array_equal(keys, expected)
    np.testing.assert_array_equal(values, -expected)
    assert none is None


def test_positions_behind_the_end_are_cleared_in_the_only_page_of_each_row():
    values = jnp.full((3, 4, 1, 2), jnp.nan).at[1:, :3].set(1.0)
    keys = -values
    whole = KeyValues(keys, values).cleared(jnp.array([0, 3, 2]))
    expected = np.zeros((3, 4, 1, 2))
    expected[1, :3] = expected[2, :2] = 1
    np.testing.assert_array_equal(whole.values, expected)
    np.testing.assert_array_equal(whole.keys, -expected)
    one_row = KeyValues(keys, values, jnp.array([[2]])).cleared(jnp.array([2]))
    np.testing.assert_array_equal(one_row.values[2], expected[2])
    np.testing.assert_array_equal(one_row.keys[2], -expected[2])
    np.testing.assert_array_equal(one_row.values[:2], values[:2])


def test_no_two_places_of_a_write_are_equal():
    """XLA is told so. Rows lack pages; positions are behind the page table, or are padding of a ring."""
    positions = jnp.array([[2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])
    pool = jnp.zeros((4, 2, 1, 3))
    paged = KeyValues(pool, pool, jnp.array([[1, 2, 4], [3, 4, 4], [4, 4, 4]]))
    row, slot = (np.broadcast_to(x, (3, 6)) for x in paged._places(positions))
    assert len(set(zip(row.flat, slot.flat, strict=True))) == 18
    assert [(r, s) for r, s in zip(row.flat, slot.flat, strict=True) if r < 4] == [
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
    ]
    row, slot = (np.broadcast_to(x, (3, 6)) for x in KeyValues(pool[:3], pool[:3])._places(positions))
    assert len(set(zip(row.flat, slot.flat, strict=True))) == 18
    ring = RingKeyValues(jnp.zeros((3, 4, 1, 3)), jnp.zeros((3, 4, 1, 3)), jnp.array([6, 2, 0]))
    slots = np.asarray(ring._slots(positions))
    assert all(len(set(each)) == 6 for each in slots)
    assert [sorted(each[each < 4]) for each in slots] == [[0, 1, 2, 3], [0, 1], []]
    for cache in (paged, ring):
        write = cache.write if cache is paged else cache._written
        lowered = jax.jit(write).lower(positions, *[jnp.ones((3, 6, 1, 3))] * 2).as_text()
        assert lowered.count("unique_indices = true") == 2


WINDOW = 5
extended = jax.jit(RingKeyValues.extended)


def ring_attention(positions: np.ndarray, state: RingKeyValues, counts=None):
    """Returns, for each new token, the positions that it sees, from keys that hold their positions."""
    keys = jnp.asarray(positions, jnp.float32)[..., None, None]
    keys, _, slots, state = extended(state._replace(counts=counts), jnp.asarray(positions), keys, keys)
    distance = positions[:, :, None] - np.asarray(slots)[:, None, :]
    visible = (distance >= 0) & (distance < WINDOW)
    held = np.asarray(keys)[:, :, 0, 0]
    return [[sorted(held[b][row].tolist()) for row in visible[b]] for b in range(len(positions))], state


def expected(positions: np.ndarray):
    return [[[float(q) for q in range(max(p - WINDOW + 1, 0), p + 1)] for p in row] for row in positions]


@pytest.mark.parametrize("piece", [1, 3, SPARE_SLOTS, 40])
def test_a_ring_shows_each_token_its_window(piece):
    """In pieces of several sizes, some larger than the ring, many rounds of which pass."""
    state = RingKeyValues.zeros(2, ring_slots(WINDOW), 1, 1, jnp.float32)
    for start in range(0, 120, piece):
        positions = np.broadcast_to(start + np.arange(piece), (2, piece))
        seen, state = ring_attention(positions, state)
        assert seen == expected(positions)


def test_a_ring_forgets_padding_and_tokens_that_are_taken_back():
    state = RingKeyValues.zeros(2, ring_slots(WINDOW), 1, 1, jnp.float32)
    lengths = np.array([0, 0])
    rng = np.random.default_rng(2)
    for round in range(12):
        padded = 30 if round % 3 == 0 else SPARE_SLOTS
        counts = rng.integers(0, padded + 1, 2)
        positions = lengths[:, None] + np.arange(padded)
        written = jnp.asarray(counts) if padded > SPARE_SLOTS else None  # None: written and then taken back.
        seen, state = ring_attention(positions, state, written)
        for row, count in enumerate(counts):
            assert seen[row][:count] == expected(positions)[row][:count]
        lengths = lengths + counts
