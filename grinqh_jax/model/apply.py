"""How a decoder's linear layers are applied: a strategy object, called with each layer's name.

One decoder thus serves prefill (``Dense``), decoding (``Graded``) and whatever wants to see the
inputs, such as calibration: any callable ``apply(name, linear, x [..., K]) -> y [..., N]`` will do.
A strategy may collect what it saw during the call, traced values included, for its caller to read.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.model.linear import GradedLinear, Linear
from pallas_kernels import Activations, GradingStats, PartialSums, decode_rows, grading

HEAD = "lm_head"
"""Name of the output projection, and what the names of its blocks begin with. Its result is float32 whatever
the compute dtype."""

COUNTED_TOGETHER = 4
"""Layers of a width whose inputs ``Previewing`` keeps before it counts their bits."""


def of_head(name: str) -> bool:
    """Whether a linear layer is a block of the output projection."""
    return name.startswith(HEAD)


@runtime_checkable
class Apply(Protocol):
    """Applies the linear layer called ``name`` to ``x``."""

    def __call__(self, name: str, linear: Linear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]: ...


class Dense:
    """Every layer at full precision (all planes of a graded one)."""

    def __call__(self, name: str, linear: Linear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        return linear.dense(x, jnp.float32 if of_head(name) else None)


class Previewing(Dense):
    """Every layer at full precision, and, at some positions, what graded reading would have taken.

    Attributes:
      thresholds: by layer name, float32 ``[B, P]``.
      positions: which to look at, int32 ``[B, s]``.
    """

    def __init__(self, thresholds: Mapping[str, Float[Array, "b p"]], positions: Int[Array, "b s"]):
        self.thresholds = thresholds
        self.positions = positions
        self._waiting: dict[int, dict[str, Float[Array, "b s k"]]] = {}
        self._bits: dict[str, Float[Array, "b s"]] = {}

    def __call__(self, name: str, linear: Linear, x: Float[Array, "b t k"]) -> Float[Array, "b t n"]:
        return super().__call__(name, linear, self.look(name, x))

    def look(self, name: str, x: Float[Array, "b t k"]) -> Float[Array, "b t k"]:
        """Looks at a layer's inputs, and returns them; by itself, for a layer whose outputs nobody wants."""
        waiting = self._waiting.setdefault(x.shape[-1], {})
        # Before the product, or XLA keeps the inputs of all layers for a look at the end: 2.9 GB for 2,048
        # tokens of Qwen3-8B.
        waiting[name], x = jax.lax.optimization_barrier(
            (jnp.take_along_axis(x, self.positions[..., None], axis=1), x)
        )
        # A few layers of a width are counted together: quicker to compile than one by one.
        if len(waiting) == COUNTED_TOGETHER:
            self._count(self._waiting.pop(x.shape[-1]))
        return x

    @property
    def bits(self) -> dict[str, Float[Array, "b s"]]:
        """By layer name, mean bits at the positions."""
        while self._waiting:
            self._count(self._waiting.popitem()[1])
        return self._bits

    def _count(self, seen: Mapping[str, Float[Array, "b s k"]]) -> None:
        thresholds = jnp.stack([self.thresholds[name] for name in seen])[:, :, None]
        levels = grading.levels(jnp.stack(list(seen.values())), thresholds)
        self._bits |= zip(seen, grading.realised_bits(levels), strict=True)


class Graded:
    """Every layer graded by its input: channel j at level ``#{ l : |x_j| >= t_l }``.

    Attributes:
      thresholds: by layer name, float32 ``[P]``, or ``[B, P]`` for a set per row of the batch.
      readings: by layer name, realised mean bits and largest ``|x|`` of every row of ``x.shape[:-1]``.
    """

    def __init__(self, thresholds: Mapping[str, Float[Array, "*b p"]]):
        self.thresholds = thresholds
        self.stats: dict[str, GradingStats] = {}

    @property
    def bits(self) -> dict[str, Float[Array, "*rows"]]:
        """By layer name, realised mean bits of every row."""
        return {name: reading.bits for name, reading in self.stats.items()}

    def __call__(
        self, name: str, linear: GradedLinear, x: Float[Array, "*rows k"] | Activations
    ) -> Float[Array, "*rows n"] | PartialSums:
        if isinstance(x, Activations):
            inputs, rows = x, (x.values.shape[0], 1)
        else:
            inputs, rows = Activations(x.reshape(-1, x.shape[-1])), x.shape[:-1]
        thresholds = self.thresholds[name]
        if thresholds.ndim == 2:  # [B, P]: a batch row's positions share its thresholds
            thresholds = thresholds.reshape(-1, *(1,) * (len(rows) - 1), thresholds.shape[-1])
        planes = thresholds.shape[-1]
        thresholds = jnp.broadcast_to(thresholds, (*rows, planes)).reshape(-1, planes)
        y, reading = linear.graded(inputs, thresholds)
        self.stats[name] = GradingStats(reading.packed.reshape(*rows, 2))
        one_token = len(rows) == 2 and rows[1] == 1
        if one_token and not of_head(name) and decode_rows.supports(y, inputs.values.dtype) is None:
            return y
        return y.total().reshape(*rows, -1).astype(jnp.float32 if of_head(name) else inputs.values.dtype)
