"""Trials of other splits of the bits: over layers, over the vocabulary, over tokens.

Level gains are fitted, not trained. Weights are refitted unless noted. The reference is the trial ``basis``
of ``bases``, the product with these flags.

* ``more-bits-for-down``, ``most-bits-for-down``: errors of ``down`` count 2 or 4 times.
* ``layers-as-seen``: no share of the layers' sensitivity is spread over all layers (``allocation.UNSEEN``).
* ``vocabulary-as-seen``, ``vocabulary-nearly-as-seen``: no share of the tokens' sensitivity, or a third of
  the product's, is spread over all tokens (``vocabulary.UNSEEN``).
* ``one-block``, ``more-blocks``: one vocabulary block, or up to five (four for a small vocabulary).
* ``uniform-split``: every layer reads the same mean bits; weights are not refitted.
* ``unit-of-the-token``: the same with thresholds in units of the token's mean ``|x|``.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from trial import NOT_TRAINED, PLAIN_WEIGHTS, Trial, patched

from checkpoints_tools.calibration import allocation, histogram, statistics
from checkpoints_tools.calibration.allocation import GradedCosts, smooth_sensitivities
from checkpoints_tools.convert import place_thresholds, vocabulary
from grinqh_jax.model import output_projection
from grinqh_jax.model.apply import Graded, in_head

UNIFORM = (*PLAIN_WEIGHTS, "--split", "uniform")


def counting_down(times: float) -> Callable[[], AbstractContextManager]:
    """Returns a ``change`` that multiplies the errors of ``down`` by ``times``."""

    def costs(layers: Mapping[str, GradedCosts]) -> dict[str, GradedCosts]:
        return {
            name: GradedCosts(c.counts, c.errors * (times if name.endswith(".down") else 1), c.weights)
            for name, c in smooth_sensitivities(layers).items()
        }

    return patched((place_thresholds, "smooth_sensitivities", costs))


def mean_magnitude(x: jax.Array) -> jax.Array:
    """Returns the mean ``|x|`` of each token, ``[..., 1]``, or 1 if all its activations are 0."""
    mean = jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jnp.where(mean > 0, mean, 1)


def unit_of_the_token() -> Callable[[], AbstractContextManager]:
    """Returns a ``change`` to thresholds in units of the token's mean ``|x|``, in calibration and grading."""

    def observe(x: jax.Array) -> dict[str, jax.Array]:
        counted = x[:, statistics.first_scored_position(x.shape[1]) :]
        largest = jnp.max(jnp.abs(x.astype(jnp.float32)))
        return {"counts": histogram.count(counted / mean_magnitude(counted)), "max": largest}

    def graded(self, name, linear, x):
        thresholds = jnp.broadcast_to(self.thresholds[name][:, None], (*x.leading, linear.weight.num_planes))
        y, self.stats[name] = linear.graded(x, thresholds * mean_magnitude(x.array))
        return y if in_head(name) else y.astype(x.dtype)

    return patched((statistics, "observe", observe), (Graded, "__call__", graded))


SPLITS = {
    "more-bits-for-down": Trial("errors of `down` count twice", NOT_TRAINED, counting_down(2.0)),
    "most-bits-for-down": Trial("errors of `down` count four times", NOT_TRAINED, counting_down(4.0)),
    "layers-as-seen": Trial(
        "layers as the text needs them", NOT_TRAINED, patched((allocation, "UNSEEN", 0.0))
    ),
    "vocabulary-as-seen": Trial(
        "tokens as the text needs them", NOT_TRAINED, patched((vocabulary, "UNSEEN", 0.0))
    ),
    "vocabulary-nearly-as-seen": Trial(
        "a third of the share for all tokens", NOT_TRAINED, patched((vocabulary, "UNSEEN", 0.05))
    ),
    "one-block": Trial(
        "one block of the vocabulary", NOT_TRAINED, patched((output_projection, "_BLOCK_END_DIVISORS", (1,)))
    ),
    "more-blocks": Trial(
        "four blocks", NOT_TRAINED, patched((output_projection, "_BLOCK_END_DIVISORS", (64, 16, 4, 2, 1)))
    ),
    "uniform-split": Trial("each layer has the mean", UNIFORM),
    "unit-of-the-token": Trial(
        "each layer has the mean, in units of the token", UNIFORM, unit_of_the_token()
    ),
}
