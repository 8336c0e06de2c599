"""Products of rows with unquantized experts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.model import experts


@pytest.mark.parametrize("function", [partial(experts._in_blocks, num_experts=4), experts._row_by_row])
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.uint16])
def test_each_row_is_multiplied_by_its_expert(function, stored):
    """uint16 numbers are the bits of bfloat16. Expert 1 has no row, expert 3 has several."""
    rng = np.random.default_rng(0)
    chosen = np.asarray([3, 0, 3, 2, 3])
    x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((5, 40), (4, 40, 24)))
    exact = np.einsum("rk,rkn->rn", np.asarray(x, np.float64), np.asarray(kernel, np.float64)[chosen])
    if stored == jnp.uint16:
        kernel = jax.lax.bitcast_convert_type(kernel, jnp.uint16)
    y = jax.jit(function)(x, kernel.astype(stored), jnp.asarray(chosen))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


def test_rows_of_experts_outside_of_a_group_get_zeros():
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.standard_normal((6, 40, 24)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((6, 24)), jnp.float32)
    x, chosen = jnp.asarray(rng.standard_normal((3, 2, 40)), jnp.float32), rng.integers(0, 6, (3, 2))
    chosen[0], factors = (1, 3), jnp.asarray(rng.uniform(0.5, 1, (3, 2)), jnp.float32)
    whole = experts.DenseExperts(kernel, bias).choose(jnp.asarray(chosen), factors)
    group = experts.DenseExperts(kernel[2:5], bias, first=2, num_experts=6)
    of_group = group.choose(jnp.asarray(chosen), factors)
    is_held = (chosen >= 2) & (chosen < 5)
    np.testing.assert_array_equal(of_group.is_held, is_held)
    assert whole.is_held is None
    expected = np.where(is_held[..., None], whole.dense(x), 0)
    np.testing.assert_allclose(of_group.dense(x), expected, rtol=1e-5, atol=1e-5)
