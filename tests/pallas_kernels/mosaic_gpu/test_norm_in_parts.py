"""Activations that a norm is still to be applied to, its mean square in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulate
from matvec_cases import Case

from pallas_kernels import Activations, graded_matvec, graded_partial_sums

SQUARES = np.array([[1.0, 2.0, 0.75], [0.0, 0.0, 0.0]], np.float32)
FACTORS = np.array([[0.5], [2.0]], np.float32)
"""Of SQUARES with an eps of 1/4; powers of two, so that multiplying by them is exact."""


@pytest.fixture
def case():
    return Case(300, 600, rows=2)


def test_the_program_reads_and_multiplies_what_the_norm_gives(case):
    x, weight, thresholds = case.arrays()
    y, bits = emulate(x, weight, thresholds, case.config, squares=SQUARES, eps=0.25)
    normed, normed_bits = emulate((x * FACTORS).astype(x.dtype), weight, thresholds, case.config)
    np.testing.assert_allclose(y, normed, rtol=1e-6, atol=1e-6 * np.abs(normed).max())
    np.testing.assert_array_equal(bits, normed_bits)
    assert not np.array_equal(bits, emulate(x, weight, thresholds, case.config)[1])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_so_do_the_others(case, implementation):
    x, weight, thresholds = jax.tree.map(jnp.asarray, case.arrays())
    inputs = Activations.of(x, jnp.asarray(SQUARES), eps=0.25)
    y, stats = graded_partial_sums(inputs, weight, thresholds, implementation=implementation)
    normed = (x * FACTORS).astype(x.dtype)
    expected, normed_bits = graded_matvec(normed, weight, thresholds, implementation=implementation)
    np.testing.assert_allclose(y.array, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(stats.bits, normed_bits)
    np.testing.assert_allclose(stats.max_abs, np.abs(normed.astype(np.float32)).max(1), rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 16, 32, 33, 70])
def test_any_number_of_parts(case, parts):
    x, weight, thresholds = case.arrays()
    rng = np.random.default_rng(parts)
    squares = rng.integers(0, 8, (2, parts)).astype(np.float32) / 32  # sums are exact in any order
    y, bits = emulate(x, weight, thresholds, case.config, squares=squares, eps=0.25)
    whole = squares.sum(1, keepdims=True)
    expected, expected_bits = emulate(x, weight, thresholds, case.config, squares=whole, eps=0.25)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(bits, expected_bits)


def test_nan_in_the_mean_square_reaches_the_row(case):
    x, weight, thresholds = case.arrays()
    squares = np.array([[np.nan, 1], [1, 0]], np.float32)
    y, _ = emulate(x, weight, thresholds, case.config, squares=squares)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
