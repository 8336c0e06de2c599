"""Activations whose sums are left to the next kernel, against their value as an array."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Activations

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 1, 8)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_array_is_one_partial(shape, dtype):
    array = jnp.asarray(RNG.standard_normal(shape), dtype)
    x = Activations.of(array)
    assert (x.leading, x.features, x.dtype) == (shape[:-1], 8, dtype)
    assert x.array.dtype == dtype
    np.testing.assert_array_equal(x.array, array)
    assert x.factor() == 1.0


def test_partial_sums_are_added_without_their_padding_and_rounded_once():
    partials = RNG.standard_normal((5, 2, 1, 12)).astype(np.float32)
    x = Activations.sums(jnp.asarray(partials), 10)
    assert (x.leading, x.dtype) == ((2, 1), jnp.float32)
    exact = partials.astype(np.float64).sum(0)[..., :10]
    np.testing.assert_allclose(x.array, exact, rtol=1e-5, atol=1e-6)
    rounded = x.astype(jnp.bfloat16).array
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, x.array.astype(jnp.bfloat16))


def test_the_factor_of_a_norm_is_applied_to_the_value_or_to_the_thresholds():
    values = RNG.standard_normal((2, 3, 16)).astype(np.float32)
    square_partials = np.stack([np.mean(values**2, axis=-1) / 4] * 4, axis=-1)
    x = Activations.of(jnp.asarray(values), jnp.asarray(square_partials), eps=1e-6)
    normed = values / np.sqrt(np.mean(values.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(x.array, normed, rtol=1e-5)
    scaled = x.scale_thresholds(jnp.ones((2, 3, 1)))
    np.testing.assert_array_equal(np.abs(x.values) >= scaled, np.abs(normed) >= 1)
    np.testing.assert_array_equal(x.reshape((6,)).array.reshape(values.shape), x.array)


def test_rows_that_share_values_have_factors_of_their_own():
    values = jnp.asarray(RNG.standard_normal((2, 1, 8)), jnp.float32)
    squares = jnp.asarray(RNG.uniform(0.5, 2, (2, 3, 1)), jnp.float32)
    x = Activations.of(values, squares, repeats=3)
    assert x.leading == (2, 3)
    np.testing.assert_allclose(x.array, values / np.sqrt(squares), rtol=1e-6)
    flat = x.reshape((-1,))
    assert flat.leading == (6,)
    assert flat.stored_values.shape == (2, 8)
    np.testing.assert_array_equal(flat.array, x.array.reshape(6, 8))
    np.testing.assert_array_equal(flat.reshape((2, 1, 3)).array, x.array[:, None])


def test_terms_of_a_sum_are_left_to_the_next_kernel():
    partials = jnp.asarray(RNG.standard_normal((5, 2, 1, 3, 12)), jnp.float32)
    rows = Activations.sums(partials, 10).astype(jnp.bfloat16)
    total = rows.summed()
    assert (total.leading, total.terms, total.partials.size) == ((2, 1), 3, partials.size)
    exact = np.asarray(partials, np.float64)[..., :10].sum(axis=(0, 3))
    np.testing.assert_allclose(total.astype(jnp.float32).array, exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total.scaled(0.5).reshape((2,)).array, exact[:, 0] / 2, rtol=2**-7, atol=1e-6)
    rounded = Activations.of(rows.array).summed()
    np.testing.assert_allclose(rounded.array.astype(jnp.float32), exact, rtol=2**-5, atol=2**-6)
