"""The cache: rows of a paged cache as one contiguous array."""

import jax.numpy as jnp
import numpy as np

from grinqh_jax.model.cache import KeyValues


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


def test_values_behind_the_end_are_cleared_in_the_only_page_of_each_row():
    values = jnp.full((3, 4, 1, 2), jnp.nan).at[1:, :3].set(1.0)
    keys = jnp.ones_like(values)
    whole = KeyValues(keys, values).cleared(jnp.array([0, 3, 2]))
    expected = np.zeros((3, 4, 1, 2))
    expected[1, :3] = expected[2, :2] = 1
    np.testing.assert_array_equal(whole.values, expected)
    one_row = KeyValues(keys, values, jnp.array([[2]])).cleared(jnp.array([2]))
    np.testing.assert_array_equal(one_row.values[2], expected[2])
    np.testing.assert_array_equal(one_row.values[:2], values[:2])
