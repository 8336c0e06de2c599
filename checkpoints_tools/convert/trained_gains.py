"""The gains of all levels, trained together: with which the graded model diverges least from the original.

Least squares (``quantize_linear.fit_gains``) gives a level the gain that brings it closest to its own
weights. What the layers behind it make of the difference, and what they skip themselves, no layer can tell.
So here the gains of all layers, a few numbers each, are trained end to end to the least divergence on the
calibration text, by Adam (arXiv 1412.6980). Each step adds what is to be gained at several settings of the
dial: one set of gains serves all of them. Codes and thresholds stay what they are.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from checkpoints_tools.convert.graded_divergence import GradedParts, Text, divergence

SETTINGS = (1.5, 2.0, 3.0)
"""Mean bits that are trained at."""

STEPS = 32
"""Of Adam, each with a window for every setting."""

RATE = 0.03
"""About how much a step changes the logarithm of a gain, in the first half; then it falls to 0."""

SECOND_MOMENT_DECAY = 0.95
"""Adam's ``b2``. Its usual 0.999 would not forget the first steps before the last."""

WINDOW = 512
"""Longest window, tokens."""

LEAST_TOKENS = 4096
"""With fewer nothing is trained: the gains would suit these and no others."""


def train_gains(
    graded: GradedParts,
    windows: Int32[np.ndarray, "s t"],
    initial: Mapping[str, Float[np.ndarray, "p"]],
    done: Callable[[str], None] = lambda step: None,
) -> dict[str, Float[np.ndarray, "p"]]:
    """Trains the gains of all linear layers.

    Args:
      graded: the model.
      windows: token ids of the calibration text; cut to windows of ``WINDOW``, which are gone through in
        turn.
      initial: gains to begin with, by linear layer, above 0; of the highest level 1.
      done: called after each of ``STEPS`` steps with its name.

    Returns:
      By linear layer, float32, above 0; of the highest level 1.
    """
    settings = [bits for bits in SETTINGS if bits < graded.targets[-1]]
    text = Text.read(graded, training_windows(windows, STEPS * len(settings)))
    head = graded.head()
    rate = optax.linear_schedule(RATE, 0, transition_steps=STEPS // 2, transition_begin=STEPS // 2)
    adam = optax.adam(rate, b2=SECOND_MOMENT_DECAY)
    factors = {name: np.zeros(len(gains) - 1, np.float32) for name, gains in initial.items()}  # logarithms
    # Bound to the device like all that comes of them, or the second step would compile everything again.
    factors = jax.device_put(factors, jax.local_devices()[0])
    state = adam.init(factors)
    for step in range(STEPS):
        gains, to_factors = jax.vjp(lambda factors: _gains(initial, factors), factors)
        turn = np.arange(step * len(settings), (step + 1) * len(settings)) % len(text.embedded)
        _, gradients = divergence(graded, head, text.at(turn), gains, settings)
        updates, state = adam.update(*to_factors(gradients), state)
        factors = optax.apply_updates(factors, updates)
        done(f"gains {step}")
    return {name: np.asarray(gains) for name, gains in _gains(initial, factors).items()}


def training_windows(windows: Int32[np.ndarray, "s t"], count: int) -> Int32[np.ndarray, "s2 t2"]:
    """At most ``count`` windows of ``WINDOW`` tokens, from the whole text, each one's neighbours far away.

    Args:
      windows: token ids.
      count: how many are wanted.
    """
    length = min(WINDOW, windows.shape[1])
    rows = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    return rows[np.random.default_rng(0).permutation(len(rows))[:count]]


def _gains(
    initial: Mapping[str, Float[np.ndarray, "p"]], factors: Mapping[str, Float[Array, "p_less_1"]]
) -> dict[str, Float[Array, "p"]]:
    """Above 0 whatever the factors are; the highest level's as it was."""
    return {name: gains * jnp.exp(jnp.append(factors[name], 0)) for name, gains in initial.items()}
