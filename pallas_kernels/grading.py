"""Grading: the magnitude of an activation decides how many bits of its input channel are read."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout
from pallas_kernels.activations import Activations
from pallas_kernels.x64 import without_x64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradingStats:
    """Bits read and largest activation of each row of a graded product.

    Attributes:
      packed: float32 ``[*rows, 2]``: ``bits`` and ``max_abs`` of each row. They share one array, because a
        decode step gathers the statistics of all its products, and XLA would launch a kernel for each array.
    """

    packed: Float[Array, "*rows 2"]

    @property
    def bits(self) -> Float[Array, "*rows"]:
        """Mean bits read per weight, float32, without the scales' 0.125 bits."""
        return self.packed[..., 0]

    @property
    def max_abs(self) -> Float[Array, "*rows"]:
        """Largest ``|x|``, float32; NaN if an activation is NaN."""
        return self.packed[..., 1]

    def of_tokens(self) -> "GradingStats":
        """Returns the statistics of tokens from those of their experts, the last axis of rows.

        They are the mean of the bits and the largest activation.
        """
        packed = [jnp.mean(self.bits, axis=-1), jnp.max(self.max_abs, axis=-1)]
        return GradingStats(jnp.stack(packed, axis=-1))


@without_x64
def levels(x: Float[Array, "*rows k"], thresholds: Float[Array, "*#rows p"]) -> Int[Array, "*rows k"]:
    """Returns the level of every channel: the number of thresholds that ``|x|`` reaches.

    ``level_j = #{ l : |x_j| >= t_l }``, computed as ``not (|x_j| < t_l)``, so that a channel whose activation
    is NaN is read at the highest level and makes the output NaN.

    Args:
      x: Activations of any float dtype; compared in float32.
      thresholds: ``t_1 <= ... <= t_P`` for each row, or one set for all rows. With zeros every channel is
        read at the highest level. Only infinite and NaN activations reach a threshold of ``inf``.

    Returns:
      int32 levels in ``0..P``; each level adds two bits.
    """
    magnitude = jnp.abs(x.astype(jnp.float32))[..., None]
    reached = ~(magnitude < thresholds.astype(jnp.float32)[..., None, :])
    return jnp.sum(reached, axis=-1, dtype=jnp.int32)


def channel_gains(
    level: Int[Array, "*any"], level_gains: Float[Array, "p"] | None
) -> Float[Array, "*any"] | float:
    """Returns the gain of each channel's level (see ``NestedWeight``); an arbitrary gain at level 0."""
    return 1.0 if level_gains is None else jnp.asarray(level_gains)[jnp.maximum(level, 1) - 1]


@without_x64
def realised_bits(level: Int[Array, "*rows k"]) -> Float[Array, "*rows"]:
    """Returns the mean of ``2 * level`` over the channels: bits read per weight without the scales."""
    return layout.DIGIT_BITS * jnp.mean(level.astype(jnp.float32), axis=-1)


def zero_bits(thresholds: Float[Array, "*rows p"]) -> Float[Array, "*rows"]:
    """Returns the bits read of a channel whose activation is 0: all of them if the thresholds are 0."""
    return layout.DIGIT_BITS * jnp.sum(~(thresholds > 0), axis=-1, dtype=jnp.float32)


def level_stats(x: Float[Array, "*rows k"], level: int) -> GradingStats:
    """Returns the statistics of activations whose channels are all read at one level."""
    max_abs = jnp.max(jnp.abs(x).astype(jnp.float32), axis=-1)
    return GradingStats(jnp.stack([jnp.full_like(max_abs, layout.DIGIT_BITS * level), max_abs], axis=-1))


def stats(x: Activations, level: Int[Array, "rows k"]) -> GradingStats:
    """Returns the statistics of activations read at these levels."""
    max_abs = jnp.max(jnp.abs(x.values).astype(jnp.float32), axis=-1, keepdims=True) * x.factor()
    return GradingStats(jnp.concatenate([realised_bits(level)[:, None], max_abs], axis=-1))
