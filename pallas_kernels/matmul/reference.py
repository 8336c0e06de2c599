"""The product's specification in plain jnp: dequantize the weight at the level, then multiply in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels import codes
from pallas_kernels.weight import NestedWeight


def supports(x, weight: NestedWeight, level: int) -> str | None:
    """Returns None, because the reference takes any arguments on any device."""
    del x, weight, level
    return None


def matmul(x: jax.Array, weight: NestedWeight, level: int) -> jax.Array:
    """Implements ``api.level_matmul`` for x ``[rows, K]``."""
    w = codes.dequantize(weight, level)
    return jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
