"""Products of rows with unquantized experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.model import experts


@pytest.mark.parametrize("function", [experts._in_blocks, experts._row_by_row])
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
