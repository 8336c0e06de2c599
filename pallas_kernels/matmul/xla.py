"""The product at one level by XLA: dequantizes the planes of the level, then multiplies.

On a GPU the kernel of ``dequantization`` makes bfloat16 weights for bfloat16 activations, and reads only the
planes of the level. The gain of the level is the same for all channels, so it multiplies y.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import codes, dequantization
from pallas_kernels.weight import NestedWeight


def supports(x, weight: NestedWeight, level: int) -> str | None:
    """Returns None, because XLA takes any arguments on any device."""
    del x, weight, level
    return None


def matmul(x: jax.Array, weight: NestedWeight, level: int) -> jax.Array:
    """Implements ``api.level_matmul`` for x ``[rows, K]``."""
    dtype = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32
    if dequantization.supports(weight, dtype) is None:
        w = dequantization.dequantize_to_bfloat16(weight, level)
    else:
        w = codes.dequantize(dataclasses.replace(weight, level_gains=None), level, dtype)
    y = jnp.dot(x.astype(dtype), w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return y if weight.level_gains is None else y * jnp.asarray(weight.level_gains)[level - 1]
