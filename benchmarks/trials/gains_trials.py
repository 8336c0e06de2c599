"""Gains of the levels, found in other ways. Weights are refitted, as in the product.

* ``gains-trained``: the product.
* ``gains-none``: all 1. (Least squares in the layers where they help: ``bases``' ``basis``.)
* ``gains-fitted-everywhere``: least squares in all layers.
* ``gains-fitted-to-outputs``: least squares of the outputs' errors, not the weights', where they are fitted
  otherwise. Channels count with their second moments, as if each level read all of them.
* ``gains-half-the-steps``: trained in half as many steps of twice the size.
* ``gains-to-the-sum``: trained to the least sum of the divergences, not of their logarithms.
* ``gains-at-2-bits``: all windows read at 2 bits.
* ``gains-third-level-at-1``: the third level's gain is not trained.
* ``gains-from-1``: trained from gains of 1, not from the fitted ones.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from trial import NOT_TRAINED, Trial, patched

from checkpoints_tools.calibration import statistics
from checkpoints_tools.convert import conversion, graded_divergence, quantize_linear, trained_gains
from pallas_kernels import codes

THIRD = 2
"""Index of the third level's factor."""

ALL_LINEAR = ("",)
"""Ends of the names of linear layers that are fitted: all names end so."""


def third_level_kept(initial, factors):
    """``trained_gains._gains``, the third level's as it began."""
    return _gains(initial, {name: f.at[THIRD].set(0) for name, f in factors.items()})


def from_1(graded, windows, initial, done=lambda step: None):
    """``trained_gains.train_gains`` from other gains than were fitted."""
    return _train_gains(graded, windows, {n: np.ones_like(gains) for n, gains in initial.items()}, done)


def fitted_to_outputs() -> Callable[[], AbstractContextManager]:
    """A ``change``: see ``gains-fitted-to-outputs``."""

    def observe(x: jax.Array) -> dict[str, jax.Array]:
        counted = x[:, statistics.first_scored_position(x.shape[1]) :].reshape(-1, x.shape[-1])
        counted = counted.astype(jnp.float32)
        return _observe(x) | {"moments": jnp.matmul(counted.T, counted, precision="highest")}

    def add(self, seen: dict[str, jax.Array]) -> None:
        _add(self, seen)
        # Sums do: a gain is a ratio.
        self.moments = getattr(self, "moments", 0) + np.asarray(seen["moments"], np.float64)

    def with_moments(read_outputs, shape, seen, *args, **options):
        moments = jnp.asarray(seen.moments, jnp.float32)
        fit = jax.jit(lambda *columns: level_fit_of_outputs(moments, *columns))
        with mock.patch.object(quantize_linear, "_level_fit", fit):
            return quantize_linear.quantize_linear(read_outputs, shape, seen, *args, **options)

    return patched(
        (statistics, "observe", observe),
        (statistics.LinearStatistics, "add", add),
        (conversion, "quantize_linear", with_moments),
    )


def level_fit_of_outputs(moments, w, weight, output_weights) -> codes.LevelFit:
    """``codes.level_fit``, slopes and squares those of the outputs; the errors, for the split, stay."""
    slopes, squares = [], []
    for level in range(1, weight.num_planes + 1):
        read = codes.dequantize(weight, level)
        pushed = jnp.matmul(moments, read, precision="highest")
        slopes.append(jnp.mean(pushed * (w - read) * output_weights))
        squares.append(jnp.mean(pushed * read * output_weights))
    fit = codes.level_fit(w, weight, output_weights)
    return codes.LevelFit(fit.errors, jnp.stack(slopes), jnp.stack(squares))


_gains, _train_gains = trained_gains._gains, trained_gains.train_gains
_observe, _add = statistics.observe, statistics.LinearStatistics.add

GAINS_TRIALS = {
    "gains-trained": Trial("the product, gains trained"),
    "gains-none": Trial("no gains", ("--gains", "none")),
    "gains-fitted-everywhere": Trial(
        "gains fitted in all layers", NOT_TRAINED, patched((conversion, "GAINED", ALL_LINEAR))
    ),
    "gains-fitted-to-outputs": Trial("gains fitted to outputs", NOT_TRAINED, fitted_to_outputs()),
    "gains-half-the-steps": Trial(
        "half the steps, twice as large",
        change=patched((trained_gains, "STEPS", 16), (trained_gains, "RATE", 0.06)),
    ),
    "gains-to-the-sum": Trial(
        "to the sum of the divergences",
        # A divergence below _LEAST counts as if it were that: with 1, all of them count alike.
        change=patched((graded_divergence, "_LEAST", 1.0)),
    ),
    "gains-at-2-bits": Trial("at 2 bits only", change=patched((trained_gains, "SETTINGS", (2.0, 2.0, 2.0)))),
    "gains-third-level-at-1": Trial(
        "the third level's kept", change=patched((trained_gains, "_gains", third_level_kept))
    ),
    "gains-from-1": Trial("from gains of 1", change=patched((trained_gains, "train_gains", from_1))),
}
