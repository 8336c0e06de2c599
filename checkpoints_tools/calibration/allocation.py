"""The split of the bits over the channels of a layer, and over the layers, by one rule.

Reading channel ``j`` of a layer at level ``l`` costs ``2 l`` bits for each of its weights and adds
``x_j**2 e(l)`` to the layer's expected squared output error, where ``e(l)`` is the mean squared weight error
of the level, with each output weighted by its sensitivity (``calibration.sensitivity``). Weighted in this
way, the errors of all layers add up to one quantity, the divergence of the predictions. For a given mean of
bits over all weights, the divergence is least if every channel of every layer takes the level with the least
``x_j**2 e(l) + lambda * 2 l``, for one ``lambda``. As ``|x|`` grows, that level moves along the lower convex
hull of the points ``(2 l, e(l))``. Each threshold is therefore ``sqrt(lambda)`` times a constant of its
layer.

A layer that is unimportant on one text may be important on another, so sensitivities are first smoothed
(``smooth_sensitivities``).
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Integer

from checkpoints_tools.calibration import histogram
from pallas_kernels.layout import DIGIT_BITS

UNSEEN = 0.25
"""Share of the total sensitivity that is spread uniformly over all weights (``smooth_sensitivities``)."""

TARGET_STEP = 0.25
LOWEST_TARGET = 1.0
_BISECTIONS = 64

_LEAST_RELATIVE_SLOPE = 1e-8
"""Smallest decrease of the error that a level counts with, as a share of ``e(0)`` per bit. For the last level
of an 8-bit code it is 1e-5."""

_LEAST_SLOPE = 1e-60
"""The same in absolute units, for a layer that no prediction depends on. Such a layer gets bits after all
others."""

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Limits of the thresholds."""


def target_grid(max_bits: int) -> tuple[float, ...]:
    """Returns the mean bits that thresholds are stored for: 1.0, 1.25, ... ``max_bits``."""
    return tuple(np.arange(LOWEST_TARGET, max_bits + TARGET_STEP / 2, TARGET_STEP).tolist())


@dataclasses.dataclass(frozen=True)
class GradedCosts:
    """The properties of a linear layer that determine its share of the bits.

    Attributes:
      counts: Histogram of the activations (``histogram.count``), not empty.
      errors: Weight errors of the levels, ``e(0) ... e(P)``, float64 ``[P + 1]``.
      weights: Number of weights that a token reads.
    """

    counts: Integer[np.ndarray, "bins"]
    errors: Float[np.ndarray, "p1"]
    weights: int


def smooth_sensitivities(layers: Mapping[str, GradedCosts]) -> dict[str, GradedCosts]:
    """Spreads a share of the total sensitivity uniformly over all weights.

    A quarter of the total sensitivity is spread uniformly, so layers that are unimportant on this text are
    not starved on another: novels hardly need some layers that arithmetic cannot do without. The importance
    of a layer is the divergence without it, ``E[x**2] e(0)`` for each of its weights.

    Args:
      layers: Costs by layer, as measured.

    Returns:
      The same costs with scaled errors. A layer that nothing depends on keeps its errors.
    """
    lost = {n: histogram.mean_square(layer.counts) * layer.errors[0] for n, layer in layers.items()}
    weights = {name: layer.weights for name, layer in layers.items()}
    even = sum(lost[name] * weights[name] for name in layers) / sum(weights.values())
    return {
        name: dataclasses.replace(layer, errors=layer.errors * (1 - UNSEEN + UNSEEN * even / lost[name]))
        if lost[name] > 0
        else layer
        for name, layer in layers.items()
    }


def threshold_ratios(errors: Float[np.ndarray, "p1"]) -> Float[np.ndarray, "p"]:
    """Returns the thresholds for ``lambda = 1``: ascending, positive, finite.

    For an edge of the hull from level ``a`` to level ``b``, the threshold is the ``x`` with
    ``x**2 (e(a) - e(b)) = 2 (b - a)``. Levels between ``a`` and ``b`` are never the best choice; they share
    the threshold of the edge.

    Args:
      errors: ``e(0) ... e(P)``. A level whose error is not smaller than a lower level's gets bits last.
    """
    errors = np.asarray(errors, np.float64)
    levels = len(errors) - 1
    least_slope = max(_LEAST_RELATIVE_SLOPE * errors[0], _LEAST_SLOPE)
    ratios = np.empty(levels)
    start = 0
    while start < levels:
        ends = np.arange(start + 1, levels + 1)
        slopes = (errors[start] - errors[ends]) / (DIGIT_BITS * (ends - start))
        end = ends[np.argmax(slopes)] if slopes.max() > least_slope else levels
        ratios[start:end] = 1 / np.sqrt(max(slopes.max(), least_slope))
        start = end
    return ratios


def mean_bits(counts: Integer[np.ndarray, "bins"], thresholds: Float[np.ndarray, "*any p"]):
    """Returns the mean bits that these thresholds read of the counted activations."""
    return DIGIT_BITS * histogram.share_reaching(counts, thresholds).sum(axis=-1)


def least_within(
    read: Callable[[Float[np.ndarray, "t"]], Float[np.ndarray, "t"]],
    wanted: Float[np.ndarray, "t"],
    low: Float[np.ndarray, "t"],
    high: Float[np.ndarray, "t"],
) -> Float[np.ndarray, "t"]:
    """Finds, by bisection, the least arguments at which a falling function is at most the wanted values.

    Args:
      read: Elementwise function that never rises.
      wanted: Largest accepted values of the function.
      low, high: Limits of the search. The result is ``high`` where the function stays above the wanted value.
    """
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_many = read(middle) > wanted
        low, high = np.where(too_many, middle, low), np.where(too_many, high, middle)
    return high


def threshold_tables(
    layers: Mapping[str, GradedCosts], targets: tuple[float, ...]
) -> dict[str, Float[np.ndarray, "t p"]]:
    """Places thresholds with which all layers together read each target's mean bits per weight.

    Args:
      layers: Costs by layer.
      targets: Mean bits, positive. For ``2 P``, all bits, all thresholds are 0.

    Returns:
      Table of each layer, float32 ``[T, P]``, finite, ascending along P, descending along T. Activations that
      are exactly 0 are read only at ``2 P``. If a smaller target cannot be met without them, all others are
      read.
    """
    ratios = {name: threshold_ratios(layer.errors) for name, layer in layers.items()}
    total = sum(layer.weights for layer in layers.values())
    wanted = np.asarray(targets, np.float64)

    def thresholds(name: str, log_root: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t p"]:
        """Returns the thresholds of a layer for ``log_root = log(sqrt(lambda))``."""
        return np.clip(np.exp(log_root)[:, None] * ratios[name], _SMALLEST, _LARGEST)

    def read(log_root: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
        """Returns the mean bits that all layers together read."""
        bits = (
            layer.weights * mean_bits(layer.counts, thresholds(n, log_root)) for n, layer in layers.items()
        )
        return sum(bits) / total

    # At the lower limit every nonzero activation is read in full, at the upper one none is read.
    extremes = np.log([min(r[0] for r in ratios.values()), max(r[-1] for r in ratios.values())])
    low = np.full(len(wanted), np.log(_SMALLEST) - extremes[1])
    high = np.full(len(wanted), np.log(_LARGEST) - extremes[0])
    log_root = least_within(read, wanted, low, high)
    tables = {name: thresholds(name, log_root).astype(np.float32) for name in layers}
    for name, table in tables.items():
        table[wanted >= DIGIT_BITS * len(ratios[name])] = 0
    return tables
