"""The graded products of chosen experts in XLA operations (see ``matvec.xla`` for the two programs).

*By channel* serves few rows on a CPU. It reads the rows of words that a level reaches, where they are, in the
planes of the row's expert. *In blocks* serves many rows and other devices: it groups the rows by expert, and
runs the dense program on one expert and one block of its rows after another. It copies the weights of one
expert at once.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import grading, layout
from pallas_kernels.activations import Activations
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.experts.blocks import map_blocks
from pallas_kernels.matvec.xla import ROWS_BY_CHANNEL, dense, one_row, padded_terms


def supports(x, weight: NestedExperts) -> str | None:
    """Returns None, because XLA takes any number of rows on any device."""
    del x, weight
    return None


def partial_sums(
    x: Activations, weight: NestedExperts, experts: jax.Array, thresholds: jax.Array
) -> tuple[Activations, grading.GradingStats]:
    """Implements ``api.experts_matvec`` for x ``[rows, K]``; returns one partial sum."""
    thresholds = jnp.repeat(thresholds, x.leading[0] // len(thresholds), axis=0)
    level = grading.levels(x.values, x.scale_thresholds(thresholds))
    stats = grading.stats(x, level)
    values, level = padded_terms(x, level, weight.level_gains, weight.planes.shape[2])
    arguments = values, level, experts, weight.planes, weight.scales
    # Few rows for each expert do not repay the dense program's unpacking of all planes.
    if len(values) <= ROWS_BY_CHANNEL * weight.num_experts:
        y = jax.lax.platform_dependent(*arguments, cpu=_by_channel, default=_in_blocks)
    else:
        y = _in_blocks(*arguments)
    positions = layout.digit_major_positions(weight.scales.shape[2])
    return Activations.of(y[:, positions[: weight.out_features]] * x.factor()), stats


def _by_channel(x, level, experts, planes, scales):
    """Returns y ``[rows, N]``, digit-major, for x and level ``[rows, K]`` and stored scales."""

    def row(arguments):
        x, level, expert = arguments
        return one_row(x, level, planes, expert, _digit_major(scales[expert]))

    return jax.lax.map(row, (x, level, experts))


def _in_blocks(x, level, experts, planes, scales):
    """Returns what ``_by_channel`` returns."""

    def block(expert, rows):
        x, level = rows
        return dense(x, level, planes[expert], _digit_major(scales[expert]))

    return map_blocks(block, (x, level), experts, num_experts=len(planes), outputs=scales.shape[2])


def _digit_major(scales):
    """Returns the scales of one expert, float32 ``[G, N]``, in the order of the unpacked digits."""
    order = layout.digit_major_positions(scales.shape[1]).argsort()
    return scales[:, order].astype(jnp.float32)
