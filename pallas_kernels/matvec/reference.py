"""The specification of the graded matvec, in plain jnp: dequantize each channel at its level, multiply."""

import jax
import jax.numpy as jnp

from pallas_kernels import codes, grading
from pallas_kernels.weight import NestedWeight


def supports(x, weight: NestedWeight) -> str | None:
    """Always None: the reference takes any rows on any device."""
    del x, weight
    return None


def graded_matvec(
    x: jax.Array, weight: NestedWeight, thresholds: jax.Array, units: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """See ``api.graded_matvec``; ``x [rows, K]``, ``thresholds [rows, P]``, ``units [rows, U]``."""
    if units is not None:
        thresholds = thresholds * jnp.sum(units, axis=-1, keepdims=True)

    def one_row(x, thresholds):
        level = grading.levels(x, thresholds)
        w = codes.dequantize(weight, level)
        y = jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
        return y, grading.realised_bits(level)

    return jax.lax.map(lambda row: one_row(*row), (x, thresholds))
