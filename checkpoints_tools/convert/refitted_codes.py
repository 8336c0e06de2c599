"""Writes refitted weights into codes that still read as the original weights at full precision.

A refit (``least_squares``) suits inputs that are read with few bits. At full precision, which also reads
prompts, the original weights are best. A nested code can serve both: its first ``REFITTED_DIGITS`` digits
are those of the refitted weight, and the other digits bring it as close to the original weight as they can.
Levels up to ``REFITTED_DIGITS`` read the refitted weight. The levels above read the original, except where
the refit crossed the boundary of an interval. A small step ``d`` crosses the boundary of an interval of width
``c`` with probability ``|d| / c``, so on average full precision changes by ``d |d| / 2c`` only.

``bounded`` shortens the step until this change is small beside the rounding error. It compares the errors of
the outputs on text of another kind than the calibration text: a refit moves weights furthest where the
calibration text hardly excites them, and another text may excite them.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.convert.coded_linear import level_weights
from checkpoints_tools.quantizers import RoundedWeight
from pallas_kernels import codes, layout

REFITTED_DIGITS = 2
"""Number of leading digits that are those of the refitted weight: at 4 bits and less it is read."""

EXCESS = 0.2
"""Largest excess of the squared error of the outputs at full precision over that of the rounded original."""

SHARES = (*(2 ** (-k / 4) for k in range(15)), 0.0)
"""Shares of the refit's step that are tried."""


def bounded(
    w: Float[Array, "k n"],
    refitted: Float[Array, "k n"],
    rounded: RoundedWeight,
    inputs: Sequence[Float[Array, "t k"]],
    sensitivities: Float[Array, "n"],
    *,
    num_planes: int,
) -> tuple[Float[Array, "k n"], RoundedWeight]:
    """Takes the largest share of a refit that leaves full precision what it was, and writes it into codes.

    Args:
      w: Original weights.
      refitted: Refitted weights.
      rounded: Rounded original weights.
      inputs: Inputs of the projection in the original model, one array for each window, on text of another
        kind than the calibration text.
      sensitivities: Weight of each output in the error.
      num_planes: Number of stored planes.

    Returns:
      ``(target, rounded)``: the weights that the leading digits code, and their codes.
    """
    step = refitted - w

    def error(rounded: RoundedWeight) -> float:
        difference = _difference(rounded, w, num_planes)
        return sum(float(_energy(window, difference, sensitivities)) for window in inputs)

    most = (1 + EXCESS) * error(rounded)
    result = w, rounded
    low, high = 0, len(SHARES) - 1
    while low < high:  # The error grows with the share, so bisection finds the largest one within the bound.
        middle = (low + high) // 2
        target = w + SHARES[middle] * step
        candidate = with_leading_digits(rounded, target)
        if error(candidate) <= most:
            result, high = (target, candidate), middle
        else:
            low = middle + 1
    return result


@jax.jit
def with_leading_digits(rounded: RoundedWeight, target: Float[Array, "k n"]) -> RoundedWeight:
    """Returns the codes nearest to ``rounded`` whose leading digits are those of ``target``, same scales.

    Args:
      rounded: Rounded original weights.
      target: Weights that the first ``REFITTED_DIGITS`` digits code.
    """
    unread = 8 - layout.DIGIT_BITS * REFITTED_DIGITS
    first = codes.encode(target, rounded.scales) >> unread << unread
    return RoundedWeight(jnp.clip(rounded.codes, first, first + ((1 << unread) - 1)), rounded.scales)


@partial(jax.jit, static_argnames="num_planes")
def _difference(rounded: RoundedWeight, w: Float[Array, "k n"], num_planes: int) -> Float[Array, "k n"]:
    """Returns how far the codes are from the weights at full precision."""
    return level_weights(rounded.codes, rounded.scales, num_planes, jnp.float32) - w


@jax.jit
def _energy(
    inputs: Float[Array, "t k"], difference: Float[Array, "k n"], sensitivities: Float[Array, "n"]
) -> Float[Array, ""]:
    """Returns the weighted squared error of the outputs of a window at its scored positions."""
    scored = inputs[first_scored_position(len(inputs)) :].astype(jnp.float32)
    return jnp.sum(sensitivities * jnp.square(jnp.matmul(scored, difference, precision="highest")))
