"""From a layer's activations and its weights' errors to thresholds: how many bits each channel gets.

Reading channel ``j`` at level ``l`` costs ``2 l`` bits and adds ``x_j**2 e(l)`` to the expected squared
output error, ``e(l)`` being the mean squared weight error of the level. For a given mean of bits the
error is least where every channel takes the level with the least ``x_j**2 e(l) + lambda * 2 l``, for
one ``lambda``. As ``|x|`` grows, that level walks up the lower convex hull of the points
``(2 l, e(l))``, so each threshold is ``sqrt(lambda)`` times a constant of the weights. Here ``x`` is in
units of the token's mean ``|x|``, so ``lambda`` follows the token: each gets the bits asked for.
"""

import numpy as np
from jaxtyping import Float

from checkpoints_tools.calibration import histogram
from pallas_kernels.layout import DIGIT_BITS

TARGET_STEP = 0.25
LOWEST_TARGET = 1.0
_BISECTIONS = 64
_LEAST_GAIN = 1e-8  # of e(0), per bit: the last level of an 8-bit code gains 1e-5


def target_grid(max_bits: int) -> tuple[float, ...]:
    """The mean bits that thresholds are stored for: 1.0, 1.25, ... ``max_bits``."""
    return tuple(np.arange(LOWEST_TARGET, max_bits + TARGET_STEP / 2, TARGET_STEP).tolist())


def threshold_ratios(errors: Float[np.ndarray, "p1"]) -> Float[np.ndarray, "p"]:
    """The thresholds of ``lambda = 1``: ascending, positive, finite.

    The hull edge from level ``a`` to level ``b`` is crossed where ``x**2 (e(a) - e(b)) = 2 (b - a)``.
    Levels inside an edge are never the best choice: they share their edge's threshold.

    Args:
      errors: ``e(0) ... e(P)``. Levels that gain nothing over a lower one are read last; an all-zero
        weight, where none does, is graded like a Gaussian one, ``e(l) ~ 16**-l``.
    """
    errors = np.asarray(errors, np.float64)
    levels = len(errors) - 1
    if not errors.any():
        errors = 16.0 ** -np.arange(levels + 1)
    least_slope = _LEAST_GAIN * errors[0]
    ratios = np.empty(levels)
    start = 0
    while start < levels:
        ends = np.arange(start + 1, levels + 1)
        slopes = (errors[start] - errors[ends]) / (DIGIT_BITS * (ends - start))
        end = ends[np.argmax(slopes)] if slopes.max() > least_slope else levels
        ratios[start:end] = 1 / np.sqrt(max(slopes.max(), least_slope))
        start = end
    return ratios


def mean_bits(counts: Float[np.ndarray, "bins"], thresholds: Float[np.ndarray, "*any p"]):
    """Mean bits read with these thresholds from the activations that ``counts`` has counted."""
    return DIGIT_BITS * histogram.share_reaching(counts, thresholds).sum(axis=-1)


def threshold_table(
    counts: Float[np.ndarray, "bins"], errors: Float[np.ndarray, "p1"], targets: tuple[float, ...]
) -> Float[np.ndarray, "t p"]:
    """Thresholds that read each target's mean bits from the counted activations.

    Args:
      counts: a histogram of ``|x|`` (``histogram.count``), not empty.
      errors: ``e(0) ... e(P)`` of the weight.
      targets: mean bits, each above 0; ``2 P`` (everything is read) gives zeros.

    Returns:
      float32 ``[T, P]``, finite, ascending along P, descending along T. A target that needs more than
      all activations other than exact zeros reads just those.
    """
    ratios = threshold_ratios(errors)
    wanted = np.asarray(targets, np.float64)
    # Between these two every activation of any size is read in full, or none is.
    low = np.full(len(wanted), np.log(np.finfo(np.float32).tiny / ratios[-1]))
    high = np.full(len(wanted), np.log(np.finfo(np.float32).max / ratios[-1]))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_many = mean_bits(counts, np.exp(middle)[:, None] * ratios) > wanted
        low, high = np.where(too_many, middle, low), np.where(too_many, high, middle)
    table = np.exp(high)[:, None] * ratios
    table[wanted >= DIGIT_BITS * len(ratios)] = 0
    return table.astype(np.float32)
