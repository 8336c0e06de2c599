"""Activations whose unit and whose norm's mean square come in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulate
from matvec_cases import Case

from pallas_kernels import Activations, graded_matvec, graded_partial_sums

UNITS = np.array([[0.25, 0.5, 1.25], [0.0, 0.0, 0.5]], np.float32)


@pytest.fixture
def case():
    return Case(300, 600, rows=2)


def test_the_program_multiplies_the_thresholds_by_the_sum(case):
    x, weight, thresholds = case.arrays()
    y, bits = emulate(x, weight, thresholds, case.config, UNITS)
    expected, expected_bits = emulate(x, weight, thresholds * UNITS.sum(1, keepdims=True), case.config)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(bits, expected_bits)
    assert not np.array_equal(bits, emulate(x, weight, thresholds, case.config)[1])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_so_do_the_other_implementations(case, implementation):
    x, weight, thresholds = jax.tree.map(jnp.asarray, case.arrays())
    units = jnp.asarray(UNITS)
    y, bits = graded_matvec(x, weight, thresholds, units, implementation=implementation)
    scaled = thresholds * jnp.sum(units, axis=1, keepdims=True)
    expected, expected_bits = graded_matvec(x, weight, scaled, implementation=implementation)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(bits, expected_bits)


@pytest.mark.parametrize("parts", [1, 2, 16, 32, 33, 70])
def test_any_number_of_parts(case, parts):
    x, weight, thresholds = case.arrays()
    rng = np.random.default_rng(parts)
    units = rng.integers(0, 8, (2, parts)).astype(np.float32) / 32  # sums are exact in any order
    _, bits = emulate(x, weight, thresholds, case.config, units)
    scaled = thresholds * units.sum(1, keepdims=True)
    np.testing.assert_array_equal(bits, emulate(x, weight, scaled, case.config)[1])


SQUARES = np.array([[1.0, 2.0, 0.75], [0.0, 0.0, 0.0]], np.float32)
FACTORS = np.array([[0.5], [2.0]])


def test_the_program_divides_by_the_root_of_the_mean_square(case):
    x, weight, thresholds = case.arrays()
    y, bits = emulate(x, weight, thresholds, case.config, squares=SQUARES, eps=0.25)
    plain, plain_bits = emulate(x, weight, thresholds, case.config)
    np.testing.assert_allclose(y, plain * FACTORS, rtol=1e-6)
    np.testing.assert_array_equal(bits, plain_bits)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_so_do_the_others(case, implementation):
    x, weight, thresholds = jax.tree.map(jnp.asarray, case.arrays())
    inputs = Activations(x, None, jnp.asarray(SQUARES), eps=0.25)
    sums, bits = graded_partial_sums(inputs, weight, thresholds, implementation=implementation)
    plain, plain_bits = graded_matvec(x, weight, thresholds, implementation=implementation)
    np.testing.assert_allclose(sums.total(), plain * FACTORS, rtol=1e-6)
    np.testing.assert_array_equal(bits, plain_bits)


def test_nan_in_the_mean_square_reaches_the_row(case):
    x, weight, thresholds = case.arrays()
    squares = np.array([[np.nan, 1], [1, 0]], np.float32)
    y, _ = emulate(x, weight, thresholds, case.config, squares=squares)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
