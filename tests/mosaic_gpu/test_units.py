"""Thresholds in a unit of the activations' own scale, given in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulate
from matvec_cases import Case

from pallas_kernels import graded_matvec

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
