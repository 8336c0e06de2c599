"""Gains of the levels, found in other ways. Weights are refitted, as in the product.

* ``gains-trained``: the product.
* ``gains-none``: all 1. (Least squares in the layers where they help: ``bases``' ``basis``.)
* ``gains-fitted-everywhere``: least squares in all layers.
* ``gains-half-the-steps``: trained in half as many steps of twice the size.
* ``gains-to-the-sum``: trained to the least sum of the divergences, not of their logarithms.
* ``gains-at-2-bits``: all windows read at 2 bits.
* ``gains-third-level-at-1``: the third level's gain is not trained.
* ``gains-from-1``: trained from gains of 1, not from the fitted ones.
"""

import numpy as np
from trial import NOT_TRAINED, Trial, patched

from checkpoints_tools import conversion, graded_divergence, trained_gains

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


_gains, _train_gains = trained_gains._gains, trained_gains.train_gains

GAINS_TRIALS = {
    "gains-trained": Trial("the product, gains trained"),
    "gains-none": Trial("no gains", ("--gains", "none")),
    "gains-fitted-everywhere": Trial(
        "gains fitted in all layers", NOT_TRAINED, patched((conversion, "GAINED", ALL_LINEAR))
    ),
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
