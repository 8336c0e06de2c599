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
