"""Linear layers: where their products are rounded."""

import jax
import jax.numpy as jnp
import pytest

from grinqh_jax.model.linear import OUTPUTS_OF_ONE_ROUNDING, ROWS_OF_ONE_ROUNDING, DenseLinear


def dtype_of_product(rows: int, outputs: int, bias: bool = False, dtype=None):
    """Dtype of the matrix product of a bfloat16 layer."""
    layer = DenseLinear(jnp.zeros((8, outputs), jnp.bfloat16), jnp.zeros(outputs) if bias else None)
    x = jax.ShapeDtypeStruct((1, rows, 8), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda x: layer.dense(x, dtype))(x)
    (product,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general")
    return product.outvars[0].aval.dtype


def test_large_products_are_rounded_once():
    outputs = OUTPUTS_OF_ONE_ROUNDING // ROWS_OF_ONE_ROUNDING
    assert dtype_of_product(ROWS_OF_ONE_ROUNDING, outputs) == jnp.bfloat16


@pytest.mark.parametrize(
    ("fewer_rows", "fewer_outputs", "options"),
    [(1, 0, {}), (0, 1, {}), (0, 0, {"bias": True}), (0, 0, {"dtype": jnp.float32})],
)
def test_sums_are_float32_otherwise(fewer_rows, fewer_outputs, options):
    """A sum of partial sums, or with a bias, has to be rounded behind it."""
    outputs = OUTPUTS_OF_ONE_ROUNDING // ROWS_OF_ONE_ROUNDING
    assert (
        dtype_of_product(ROWS_OF_ONE_ROUNDING - fewer_rows, outputs - fewer_outputs, **options) == jnp.float32
    )
