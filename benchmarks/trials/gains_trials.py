"""Trials of other ways to find the level gains. Weights are refitted, as in the product.

* ``gains-trained``: the product.
* ``gains-none``: all gains are 1. (The trial ``basis`` of ``bases`` has least-squares gains where they help.)
* ``gains-fitted-everywhere``: least-squares gains in all layers.
* ``gains-fitted-to-outputs``: least-squares gains of the outputs' errors instead of the weights' errors, in
  the same layers. Channels are weighted by their second moments, as if each level read all of them.
* ``gains-half-the-steps``: trained in half as many steps of twice the size.
* ``gains-to-the-sum``: trained to minimize the sum of the divergences instead of their logarithms.
* ``gains-at-2-bits``: trained with all windows at 2 bits.
* ``gains-third-level-trained``: trained with the third level's gain, which the product leaves as it is.
* ``gains-from-1``: trained from gains of 1 instead of the fitted ones.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from trial import NOT_TRAINED, Trial, patched

from checkpoints_tools.calibration import statistics
from checkpoints_tools.convert import (
    graded_divergence,
    measure_layers,
    quantize_linear,
    refit_layers,
    train_gains,
)
from checkpoints_tools.quantizers import LevelFit, level_fit
from pallas_kernels import codes


def from_1(model, windows, initial, on_progress=lambda note: None):
    """``train_gains.train_gains`` from gains of 1 instead of the fitted ones."""
    ones = {name: np.ones_like(gains) for name, gains in initial.items()}
    return _train_gains(model, windows, ones, on_progress)


def fitted_to_outputs() -> Callable[[], AbstractContextManager]:
    """Returns the ``change`` of ``gains-fitted-to-outputs``."""

    def observe(x: jax.Array) -> dict[str, jax.Array]:
        counted = x[:, statistics.first_scored_position(x.shape[1]) :].reshape(-1, x.shape[-1])
        counted = counted.astype(jnp.float32)
        return _observe(x) | {"moments": jnp.matmul(counted.T, counted, precision="highest")}

    def add(self, seen: dict[str, jax.Array]) -> None:
        _add(self, seen)
        # A gain is a ratio, so sums can stand for means.
        self.moments = getattr(self, "moments", 0) + np.asarray(seen["moments"], np.float64)

    def with_moments(measure):
        def measured(rounding, read_outputs, *args):
            moments = jnp.asarray(rounding.inputs.moments, jnp.float32)
            with mock.patch.object(quantize_linear, "level_fit", partial(level_fit_of_outputs, moments)):
                return measure(rounding, read_outputs, *args)

        return measured

    measure_linear = with_moments(quantize_linear.measure_linear)
    quantize = with_moments(quantize_linear.quantize_linear)
    return patched(
        (statistics, "observe", observe),
        (statistics.LinearStatistics, "add", add),
        (measure_layers, "measure_linear", measure_linear),
        (measure_layers, "quantize_linear", quantize),
        (refit_layers, "quantize_linear", quantize),
    )


@partial(jax.jit, static_argnames="num_planes")
def level_fit_of_outputs(moments, w, rounded, sensitivities, *, num_planes) -> LevelFit:
    """``level_fit`` with slopes and squares of the outputs; the errors, which split the bits, stay."""
    weight = codes.from_codes(rounded.codes, rounded.scales, max_bits=2 * num_planes)
    slopes, squares = [], []
    for level in range(1, num_planes + 1):
        read = codes.dequantize(weight, level)
        pushed = jnp.matmul(moments, read, precision="highest")
        slopes.append(jnp.mean(pushed * (w - read) * sensitivities))
        squares.append(jnp.mean(pushed * read * sensitivities))
    fit = level_fit(w, rounded, sensitivities, num_planes=num_planes)
    return LevelFit(fit.errors, jnp.stack(slopes), jnp.stack(squares))


_train_gains = train_gains.train_gains
_observe, _add = statistics.observe, statistics.LinearStatistics.add

GAINS_TRIALS = {
    "gains-trained": Trial("the product, gains trained"),
    "gains-none": Trial("no gains", ("--gains", "none")),
    "gains-fitted-everywhere": Trial(
        "gains fitted in all layers",
        NOT_TRAINED,
        patched((measure_layers, "gains_help", lambda config, name: True)),
    ),
    "gains-fitted-to-outputs": Trial("gains fitted to outputs", NOT_TRAINED, fitted_to_outputs()),
    "gains-half-the-steps": Trial(
        "half the steps, twice as large",
        change=patched((train_gains, "STEPS", 12), (train_gains, "RATE", 0.03)),
    ),
    "gains-to-the-sum": Trial(
        "to the sum of the divergences",
        # A divergence below the least one counts as that one: with 1, all divergences count alike.
        change=patched((graded_divergence, "_LEAST_DIVERGENCE", 1.0)),
    ),
    "gains-at-2-bits": Trial("at 2 bits only", change=patched((train_gains, "BITS", (2.0, 2.0)))),
    "gains-third-level-trained": Trial(
        "the third level's trained",
        change=patched((train_gains, "trained_levels", lambda num_planes: num_planes - 1)),
    ),
    "gains-from-1": Trial("from gains of 1", change=patched((train_gains, "train_gains", from_1))),
}
