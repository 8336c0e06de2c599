"""The specification of ``experts_matvec`` in plain jnp: dequantize each row's expert, then multiply."""

import jax
import jax.numpy as jnp

from pallas_kernels import codes, grading
from pallas_kernels.activations import Activations
from pallas_kernels.expert_weights import NestedExperts


def supports(x, weight: NestedExperts) -> str | None:
    """Returns None, because the reference takes any number of rows on any device."""
    del x, weight
    return None


def partial_sums(
    x: Activations, weight: NestedExperts, experts: jax.Array, thresholds: jax.Array
) -> tuple[Activations, grading.GradingStats]:
    """Implements ``api.experts_matvec`` for x ``[rows, K]``; returns one partial sum."""

    def one_row(row):
        x, level, expert = row
        w = codes.dequantize(weight.expert(expert), level)
        return jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)

    thresholds = jnp.repeat(thresholds, x.leading[0] // len(thresholds), axis=0)
    level = grading.levels(x.values, x.scale_thresholds(thresholds))
    y = jax.lax.map(one_row, (x.values, level, experts))
    return Activations.of(y * x.factor()), grading.stats(x, level)
