"""Products of rows with their experts on a GPU, against NumPy in float64 (``pytest -m gpu``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_graded_experts import exact, experts_weight

from grinqh_jax.model import expert_products
from grinqh_jax.model.experts import ChosenGraded

pytestmark = pytest.mark.gpu

NUM_EXPERTS, IN, OUT = 8, 768, 2048


def skewed(rows):
    """Returns experts of rows: half of them have expert 2, and none expert 5."""
    experts = np.random.default_rng(rows).choice([0, 1, 3, 4, 6, 7], rows)
    experts[::2] = 2
    return experts


def random_rows(rows):
    return jnp.asarray(np.random.default_rng(rows).standard_normal((rows, IN)), jnp.bfloat16)


@pytest.mark.parametrize("level", [None, 3])
@pytest.mark.parametrize("rows", [8, 200, 3000])
def test_graded_products_equal_those_of_each_expert(rows, level):
    weight, x, chosen = experts_weight(NUM_EXPERTS, IN, OUT), random_rows(rows), skewed(rows)

    @jax.jit
    def product(weight, x, experts):
        layer = ChosenGraded(weight, experts)
        return layer.dense(x, jnp.float32) if level is None else layer.at_level(x, level, jnp.float32)

    y, expected = product(weight, x, jnp.asarray(chosen)), exact(weight, x, chosen, level or 4)
    assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [1, 8, 128, 200, 3000])
def test_products_with_kernels_equal_those_of_each_expert(rows):
    """Up to 128 rows each row reads its kernel; more are multiplied in one launch."""
    kernel = np.random.default_rng(1).standard_normal((NUM_EXPERTS, IN, OUT), np.float32)
    kernel, x, chosen = jnp.asarray(kernel, jnp.bfloat16), random_rows(rows), skewed(rows)
    y = expert_products.jitted_matmul(x, kernel, jnp.asarray(chosen), NUM_EXPERTS)
    for expert in np.unique(chosen):
        of_expert = chosen == expert
        expected = np.asarray(x[of_expert], np.float64) @ np.asarray(kernel[expert], np.float64)
        assert np.linalg.norm(y[of_expert] - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_has_the_same_bits_among_any_rows(transposed):
    """1,024 rows of 8 experts take blocks of 128 rows, 500 rows of 64."""
    kernel = np.random.default_rng(1).standard_normal((NUM_EXPERTS, IN, OUT), np.float32)
    kernel, x = jnp.asarray(kernel, jnp.bfloat16), random_rows(3000)
    x = jnp.pad(x, ((0, 0), (0, OUT - IN))) if transposed else x
    product = jax.jit(expert_products.all_at_once, static_argnums=(3, 4))
    y = product(x, kernel, jnp.asarray(skewed(3000)), NUM_EXPERTS, transposed)
    for rows in (129, 500, 1024):
        some = product(x[:rows], kernel, jnp.asarray(skewed(3000)[:rows]), NUM_EXPERTS, transposed)
        np.testing.assert_array_equal(some, y[:rows])
