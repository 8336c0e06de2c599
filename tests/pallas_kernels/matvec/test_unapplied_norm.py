"""Activations that lack the factor of a norm, whose mean square comes in partial sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulate
from matvec_cases import Case

from pallas_kernels import Activations, graded_matvec, graded_partial_sums

SQUARES = np.array([[1.0, 2.0, 0.75], [0.0, 0.0, 0.0]], np.float32)
FACTORS = np.array([[0.5], [2.0]], np.float32)
"""Factors that follow from SQUARES and an eps of 1/4. They are powers of two, so multiplication is exact."""


@pytest.fixture
def case():
    return Case(300, 600, rows=2)


def test_lane_program_applies_the_factor(case):
    x, weight, thresholds = case.arrays()
    y, bits = emulate(x, weight, thresholds, case.config, square_partials=SQUARES, eps=0.25)
    normed, normed_bits = emulate((x * FACTORS).astype(x.dtype), weight, thresholds, case.config)
    np.testing.assert_allclose(y, normed, rtol=1e-6, atol=1e-6 * np.abs(normed).max())
    np.testing.assert_array_equal(bits, normed_bits)
    assert not np.array_equal(bits, emulate(x, weight, thresholds, case.config)[1])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_other_implementations_apply_the_factor(case, implementation):
    x, weight, thresholds = jax.tree.map(jnp.asarray, case.arrays())
    inputs = Activations.of(x, jnp.asarray(SQUARES), eps=0.25)
    y, stats = graded_partial_sums(inputs, weight, thresholds, implementation=implementation)
    normed = (x * FACTORS).astype(x.dtype)
    expected, normed_bits = graded_matvec(normed, weight, thresholds, implementation=implementation)
    np.testing.assert_allclose(y.array, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(stats.bits, normed_bits)
    np.testing.assert_allclose(stats.max_abs, np.abs(normed.astype(np.float32)).max(1), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 16, 32, 33, 70])
def test_any_number_of_partial_sums(case, count):
    x, weight, thresholds = case.arrays()
    rng = np.random.default_rng(count)
    squares = rng.integers(0, 8, (2, count)).astype(np.float32) / 32  # Sums are exact in any order.
    y, bits = emulate(x, weight, thresholds, case.config, square_partials=squares, eps=0.25)
    whole = squares.sum(1, keepdims=True)
    expected, expected_bits = emulate(x, weight, thresholds, case.config, square_partials=whole, eps=0.25)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(bits, expected_bits)


def test_nan_in_the_mean_square_reaches_the_row(case):
    x, weight, thresholds = case.arrays()
    squares = np.array([[np.nan, 1], [1, 0]], np.float32)
    y, _ = emulate(x, weight, thresholds, case.config, square_partials=squares)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
