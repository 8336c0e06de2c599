"""The graded matvec's specification in plain jnp: dequantize each channel at its level, then multiply."""

import jax
import jax.numpy as jnp

from pallas_kernels import codes, grading
from pallas_kernels.activations import Activations
from pallas_kernels.weight import NestedWeight


def supports(x, weight: NestedWeight) -> str | None:
    """Returns None, because the reference takes any number of rows on any device."""
    del x, weight
    return None


def partial_sums(
    x: Activations, weight: NestedWeight, thresholds: jax.Array
) -> tuple[Activations, grading.GradingStats]:
    """Implements ``api.graded_partial_sums`` for x ``[rows, K]``; returns one partial sum."""

    def one_row(x, level):
        w = codes.dequantize(weight, level)
        return jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)

    level = grading.levels(x.values, x.scale_thresholds(thresholds))
    y = jax.lax.map(lambda row: one_row(*row), (x.values, level))
    return Activations.of(y * x.factor()), grading.stats(x, level)
