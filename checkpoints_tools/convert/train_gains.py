"""Last stage of a conversion: trains the level gains of all layers together to the least divergence.

Least squares (``quantize_linear.fit_gains``) brings each level closest to the weights of its layer. No layer
can choose its gains alone, because errors accumulate across layers. So the gains of all layers, a few numbers
for each, are trained end to end to the least divergence on the calibration text, by Adam (arXiv 1412.6980).
Each step sums gradients at several settings of the dial, because one set of gains serves all of them. Codes
and thresholds stay as they are, and so do the gains of the fine levels (``coded_linear.FINE_LEVEL``):
trained, they make the divergence at 3 and 4 bits larger and the one at 2 bits no smaller
(``docs/quality.md``).
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from checkpoints_tools.convert.coded_linear import FINE_LEVEL
from checkpoints_tools.convert.graded_divergence import divergence
from checkpoints_tools.convert.graded_model import GradedModel, WindowStates

BITS = (1.75, 2.5)
"""Mean bits that the gains are trained at. A third setting costs half as much again and gains nothing."""

STEPS = 24
"""Number of steps of Adam. Each uses one window for every setting."""

RATE = 0.015
"""Learning rate in the first half: the approximate change of a gain's logarithm in a step. In the second half
it falls to 0."""

SECOND_MOMENT_DECAY = 0.95
"""Adam's ``b2``. The usual 0.999 would still remember the first steps at the end."""

WINDOW = 256
"""Longest window in tokens. On a CPU the training takes as long as the rest of a conversion."""

LEAST_TOKENS = 4096
"""Minimum number of calibration tokens for training. Gains trained on fewer do not suit other text."""


def train_gains(
    model: GradedModel,
    windows: Int32[np.ndarray, "s t"],
    initial: Mapping[str, Float[np.ndarray, "p"]],
    on_progress: Callable[[str], None] = lambda note: None,
) -> dict[str, Float[np.ndarray, "p"]]:
    """Trains the level gains of all linear layers.

    Args:
      model: Graded model and its original.
      windows: Token ids of the calibration text, cut to windows of ``WINDOW`` and used in turn.
      initial: Initial gains by linear layer, positive; 1 for the highest level.
      on_progress: Called with a note after each of ``STEPS`` steps.

    Returns:
      Gains by linear layer, float32, positive; 1 for the highest level.
    """
    bits = _bits(model.targets)
    states = WindowStates.compute(model, training_windows(windows, STEPS * len(bits)))
    head = model.head()
    rate = optax.linear_schedule(RATE, 0, transition_steps=STEPS // 2, transition_begin=STEPS // 2)
    adam = optax.adam(rate, b2=SECOND_MOMENT_DECAY)
    start = {name: jnp.asarray(gains) for name, gains in initial.items()}
    log_factors = {name: jnp.zeros(trained_levels(len(gains))) for name, gains in initial.items()}
    # Committed to the device, as all arrays computed from them are; otherwise the second step recompiles.
    start, log_factors, optimizer_state = jax.device_put(
        (start, log_factors, adam.init(log_factors)), jax.local_devices()[0]
    )

    @jax.jit
    def update(log_factors, optimizer_state, gradients):
        _, pull_back = jax.vjp(lambda log_factors: _gains(start, log_factors), log_factors)
        updates, optimizer_state = adam.update(*pull_back(gradients), optimizer_state)
        log_factors = optax.apply_updates(log_factors, updates)
        return log_factors, optimizer_state, _gains(start, log_factors)

    gains = start
    for step in range(STEPS):
        chosen = np.arange(step * len(bits), (step + 1) * len(bits)) % len(states.embedded)
        _, gradients = divergence(model, head, states.at(chosen), gains, bits)
        log_factors, optimizer_state, gains = update(log_factors, optimizer_state, gradients)
        on_progress(f"gains {step}")
    return {name: np.asarray(gains[name]) for name in initial}


def _bits(targets: Sequence[float]) -> list[float]:
    """Returns the settings of ``BITS`` that read fewer bits than are stored."""
    return [mean for mean in BITS if mean < targets[-1]]


def step_tokens(windows: Int32[np.ndarray, "s t"], targets: Sequence[float]) -> int:
    """Returns the number of tokens that a training step reads.

    Args:
      windows: See ``train_gains``.
      targets: Mean bits of the rows of the threshold tables.
    """
    return len(_bits(targets)) * min(WINDOW, windows.shape[1])


def training_windows(windows: Int32[np.ndarray, "s t"], count: int) -> Int32[np.ndarray, "s2 t2"]:
    """Returns up to ``count`` windows of at most ``WINDOW`` tokens, spread over the text in random order.

    Args:
      windows: Token ids.
      count: Number of windows wanted.
    """
    length = min(WINDOW, windows.shape[1])
    rows = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    return rows[np.random.default_rng(0).permutation(len(rows))[:count]]


def trained_levels(num_planes: int) -> int:
    """Returns the number of levels, from 1 on, whose gains are trained."""
    return min(FINE_LEVEL, num_planes) - 1


def _gains(
    initial: Mapping[str, Float[Array, "p"]], log_factors: Mapping[str, Float[Array, "_"]]
) -> dict[str, Float[Array, "p"]]:
    """Returns the initial gains, those of the trained levels times ``exp(log_factors)``."""
    return {
        name: gains * jnp.exp(jnp.pad(log_factors[name], (0, len(gains) - len(log_factors[name]))))
        for name, gains in initial.items()
    }
