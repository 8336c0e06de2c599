"""Strategies that apply a decoder's linear layers; the decoder calls one with the name of each layer.

One decoder thus serves prefill (``Dense``), decoding (``Graded``) and passes that observe the inputs, such as
calibration. Any callable ``apply(name, linear, x) -> y`` on ``Activations`` is a strategy. A strategy may
collect values during the call, traced ones included, for its caller to read.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.linear import GradedLinear, Linear
from pallas_kernels import Activations, GradingStats, grading

PREVIEWED_TOGETHER = 4
"""Number of layers of equal width whose bits ``Previewing`` counts at once."""


def of_head(name: str) -> bool:
    """Whether a linear layer is a vocabulary block of the output projection."""
    return name.startswith(HEAD)


@runtime_checkable
class Apply(Protocol):
    """Applies the linear layer called ``name`` to ``x [*rows, in_features]``."""

    def __call__(self, name: str, linear: Linear, x: Activations) -> Activations: ...


class Dense:
    """Applies every layer at full precision, with all planes of a graded one.

    Subclasses that observe or change inputs or outputs override ``product``.
    """

    def __call__(self, name: str, linear: Linear, x: Activations) -> Activations:
        return Activations.of(self.product(name, linear, x.array))

    def product(self, name: str, linear: Linear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        """Returns ``x @ W`` in the dtype of x, or in float32 for the output projection."""
        return linear.dense(x, jnp.float32 if of_head(name) else None)


class Previewing(Dense):
    """Applies every layer at full precision, and counts the bits that graded reading would take.

    Attributes:
      thresholds: Thresholds by layer name, float32 ``[B, P]``.
      positions: Positions to count at, int32 ``[B, s]``.
    """

    def __init__(self, thresholds: Mapping[str, Float[Array, "b p"]], positions: Int[Array, "b s"]):
        self.thresholds = thresholds
        self.positions = positions
        self._waiting: dict[int, dict[str, Float[Array, "b s k"]]] = {}
        self._bits: dict[str, Float[Array, "b s"]] = {}

    def product(self, name: str, linear: Linear, x: Float[Array, "b t k"]) -> Float[Array, "b t n"]:
        """See ``Dense``."""
        return super().product(name, linear, self.look(name, x))

    def look(self, name: str, x: Float[Array, "b t k"]) -> Float[Array, "b t k"]:
        """Counts the bits of a layer's inputs and returns them. Call it alone to skip the layer's product."""
        waiting = self._waiting.setdefault(x.shape[-1], {})
        # Without the barrier before the product, XLA (jax 0.11.2) keeps the inputs of all layers and counts
        # at the end: 2.9 GB for 2,048 tokens of Qwen3-8B.
        waiting[name], x = jax.lax.optimization_barrier(
            (jnp.take_along_axis(x, self.positions[..., None], axis=1), x)
        )
        # Counting several layers of equal width at once compiles faster.
        if len(waiting) == PREVIEWED_TOGETHER:
            self._count(self._waiting.pop(x.shape[-1]))
        return x

    @property
    def bits(self) -> dict[str, Float[Array, "b s"]]:
        """Mean bits at the positions, by layer name."""
        while self._waiting:
            self._count(self._waiting.popitem()[1])
        return self._bits

    def _count(self, inputs: Mapping[str, Float[Array, "b s k"]]) -> None:
        thresholds = jnp.stack([self.thresholds[name] for name in inputs])[:, :, None]
        levels = grading.levels(jnp.stack(list(inputs.values())), thresholds)
        self._bits |= zip(inputs, grading.realised_bits(levels), strict=True)


class Graded:
    """Applies every layer graded by its input: reads channel j at level ``#{ l : |x_j| >= t_l }``.

    Attributes:
      thresholds: Thresholds by layer name, float32 ``[P]``, or ``[B, P]`` for a set per row of the batch.
      stats: Realised mean bits and largest ``|x|`` of every row of ``x.leading``, by layer name.
    """

    def __init__(self, thresholds: Mapping[str, Float[Array, "*b p"]]):
        self.thresholds = thresholds
        self.stats: dict[str, GradingStats] = {}

    @property
    def bits(self) -> dict[str, Float[Array, "*rows"]]:
        """Realised mean bits of every row, by layer name."""
        return {name: stats.bits for name, stats in self.stats.items()}

    def __call__(self, name: str, linear: Linear, x: Activations) -> Activations:
        if not isinstance(linear, GradedLinear):
            raise ValueError(f"{name} is dense; only layers stored as nested codes can be read graded")
        thresholds = self.thresholds[name]
        if thresholds.ndim == 2:  # [B, P]: all positions of a batch row share its thresholds
            thresholds = thresholds.reshape(-1, *(1,) * (len(x.leading) - 1), thresholds.shape[-1])
        thresholds = jnp.broadcast_to(thresholds, (*x.leading, thresholds.shape[-1]))
        y, self.stats[name] = linear.graded(x, thresholds)
        return y if of_head(name) else y.astype(x.dtype)
