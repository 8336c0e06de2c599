"""Strategies that apply a decoder's linear layers.

The decoder does not multiply by its weights itself: it calls a strategy with the name of each linear layer,
the layer and its input. One decoder thus serves prefill (``Dense``), decode steps (``Graded``, or ``AtLevel``
for large batches) and passes
that observe the inputs, such as calibration. Any callable ``apply(name, linear, x) -> y`` on ``Activations``
is a strategy. A strategy may collect values, also traced ones, which its caller reads after the forward pass.
"""

import itertools
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.model.experts import ChosenDense, ChosenGraded
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.linear import GradedLinear, Linear
from grinqh_jax.model.partition import InputCut, whole_bits, whole_stats
from pallas_kernels import Activations, GradingStats, grading

AnyLinear = Linear | ChosenDense | ChosenGraded
"""A linear layer that a strategy applies: one matrix for all rows, or that of the expert of each row."""

LAYERS_COUNTED_AT_ONCE = 4
"""Number of layers with equally wide inputs whose bits ``Previewing`` counts in one operation."""


def in_head(name: str) -> bool:
    """Returns whether a linear layer belongs to the output projection: one of its vocabulary blocks."""
    return name.startswith(HEAD)


@runtime_checkable
class Apply(Protocol):
    """A strategy: computes ``y = x @ W``, exactly or not, for the linear layer called ``name``.

    For a linear layer of experts, rows are ``[b, t, c]``: one for each chosen expert of each token.
    """

    def __call__(self, name: str, linear: AnyLinear, x: Activations) -> Activations:
        """Returns ``y [*rows, out_features]`` for ``x [*rows, in_features]``."""
        ...


class Dense:
    """Applies every layer at full precision; reads all planes of a graded layer.

    To observe or change inputs or outputs, override ``product``.
    """

    def __call__(self, name: str, linear: AnyLinear, x: Activations) -> Activations:
        y = Activations.of(self.product(name, linear, x.array))
        return y if in_head(name) else y.astype(x.dtype)

    def product(self, name: str, linear: AnyLinear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        """Returns ``x @ W`` in the dtype of x, or in float32 for the output projection and partial sums."""
        wide = in_head(name) or linear.input_cut is not None
        return linear.dense(x, jnp.float32 if wide else None)


class Previewing(Dense):
    """Applies every layer at full precision, and counts the bits that graded decoding would read.

    Attributes:
      thresholds: Thresholds by layer name, float32 ``[B, P]``.
      positions: Positions to count bits at, int32 ``[B, s]``.
    """

    def __init__(self, thresholds: Mapping[str, Float[Array, "b p"]], positions: Int[Array, "b s"]):
        self.thresholds = thresholds
        self.positions = positions
        self._inputs: dict[
            str, Float[Array, "b t k"]
        ] = {}  # of one decoder layer, or of the vocabulary blocks
        self._pending: dict[int, dict[str, Float[Array, "b s k"]]] = {}  # inputs by width, then by layer name
        self._bits: dict[str, Float[Array, "b s"]] = {}
        self._cuts: dict[str, InputCut] = {}  # of layers whose bits are those of one part

    def product(
        self, name: str, linear: AnyLinear, x: Float[Array, "b t *experts k"]
    ) -> Float[Array, "b t *experts n"]:
        """Returns the product of ``Dense``, and keeps ``x``, whose bits are counted later."""
        if linear.input_cut is not None:
            self._cuts[name] = linear.input_cut
        return super().product(name, linear, self.observe(name, x))

    def observe(self, name: str, x: Float[Array, "b t *experts k"]) -> Float[Array, "b t *experts k"]:
        """Keeps a layer's inputs, to count their bits later, and returns them. Alone it skips the product."""
        if self._inputs and next(iter(self._inputs)).rpartition(".")[0] != name.rpartition(".")[0]:
            x = self._select(x)
        # The mean over the channels of all chosen experts of a token is the mean of their bits.
        self._inputs[name] = x.reshape(*x.shape[:2], -1)
        return x

    def _select(self, x: jax.Array) -> jax.Array:
        """Selects the positions from all inputs of a decoder layer, in one kernel, and returns ``x``.

        Without the barrier before the next product, XLA (jax 0.11.2) keeps the inputs of all layers and
        counts at the end: 2.9 GB for 2,048 tokens of Qwen3-8B.
        """
        at_positions = [
            jnp.take_along_axis(inputs, self.positions[..., None], axis=1) for inputs in self._inputs.values()
        ]
        selected, x = jax.lax.optimization_barrier((jnp.concatenate(at_positions, axis=-1), x))
        ends = list(itertools.accumulate(inputs.shape[-1] for inputs in at_positions))
        for name, inputs in zip(self._inputs, jnp.split(selected, ends[:-1], axis=-1), strict=True):
            pending = self._pending.setdefault(inputs.shape[-1], {})
            pending[name] = inputs
            # Counting several layers of equal width at once compiles faster.
            if len(pending) == LAYERS_COUNTED_AT_ONCE:
                self._count(self._pending.pop(inputs.shape[-1]))
        self._inputs = {}
        return x

    @property
    def bits(self) -> dict[str, Float[Array, "b s"]]:
        """Mean bits at ``positions``, float32 ``[B, s]`` by layer name."""
        if self._inputs:
            self._select(self.positions)  # No product follows; any array will do.
        while self._pending:
            self._count(self._pending.popitem()[1])
        if cuts := self._cuts:
            self._cuts = {}
            parts = {name: self._bits[name] for name in cuts}
            at_zero = {name: grading.zero_bits(self.thresholds[name])[:, None] for name in cuts}
            self._bits |= whole_bits(parts, at_zero, cuts)
        return self._bits

    def _count(self, inputs: Mapping[str, Float[Array, "b s k"]]) -> None:
        thresholds = jnp.stack([self.thresholds[name] for name in inputs])[:, :, None]
        levels = grading.levels(jnp.stack(list(inputs.values())), thresholds)
        self._bits |= zip(inputs, grading.realised_bits(levels), strict=True)


class Graded:
    """Applies every layer graded by its input: reads channel j at level ``#{ l : |x_j| >= t_l }``.

    Calling it with a dense layer raises ValueError.

    Attributes:
      thresholds: Thresholds by layer name, float32 ``[P]``, or ``[B, P]`` with one set for each row of the
        batch, or ``[B, t, P]`` with one for each position.
      of_experts: Names of the layers of experts in ``stats``.
    """

    def __init__(self, thresholds: Mapping[str, Float[Array, "*rows p"]]):
        self.thresholds = thresholds
        self.of_experts: set[str] = set()
        self._stats: dict[str, GradingStats] = {}
        self._cuts: dict[str, InputCut] = {}  # of layers whose statistics are those of one part
        self._at_zero: dict[str, Float[Array, "*rows"]] = {}

    @property
    def stats(self) -> dict[str, GradingStats]:
        """Realised mean bits and largest ``|x|`` of every row of ``x.leading``, by layer name.

        In a mixture of experts the last axis of rows is that of a token's experts. On a mesh, one exchange
        completes the statistics of all layers that ran since the last one.
        """
        if cuts := self._cuts:
            parts = {name: self._stats[name] for name in cuts}
            self._stats |= whole_stats(parts, self._at_zero, cuts)
            self._cuts, self._at_zero = {}, {}
        return self._stats

    @property
    def bits(self) -> dict[str, Float[Array, "*rows"]]:
        """Realised mean bits of every row, by layer name; of every token, in a mixture of experts."""
        return {
            name: (stats.of_tokens() if name in self.of_experts else stats).bits
            for name, stats in self.stats.items()
        }

    def __call__(self, name: str, linear: AnyLinear, x: Activations) -> Activations:
        if not isinstance(linear, GradedLinear | ChosenGraded):
            raise ValueError(f"{name} is dense; only layers stored as nested codes can be read graded")
        thresholds = self.thresholds[name]
        *rows, planes = thresholds.shape  # Further axes of the inputs share the thresholds of their row.
        if len(rows) > 0:
            thresholds = thresholds.reshape(*rows, *(1,) * (len(x.leading) - len(rows)), planes)
        if isinstance(linear, ChosenGraded):
            self.of_experts.add(name)
        else:
            thresholds = jnp.broadcast_to(thresholds, (*x.leading, thresholds.shape[-1]))
        y, self._stats[name] = linear.graded(x, thresholds)
        if linear.input_cut is not None:
            at_zero = grading.zero_bits(thresholds)
            self._cuts[name] = linear.input_cut
            self._at_zero[name] = jnp.broadcast_to(at_zero, x.leading)
        return y if in_head(name) else y.astype(x.dtype)


class AtLevel(Graded):
    """Applies every layer with all input channels at one level, for batches that are too large to grade.

    Calling it with a dense layer raises ValueError. Statistics are as in ``Graded``.

    Attributes:
      level: Level of all input channels of all layers.
    """

    def __init__(self, level: int):
        super().__init__({})
        self.level = level

    def __call__(self, name: str, linear: AnyLinear, x: Activations) -> Activations:
        if not isinstance(linear, GradedLinear | ChosenGraded):
            raise ValueError(f"{name} is dense; only layers stored as nested codes can be read at a level")
        if isinstance(linear, ChosenGraded):
            self.of_experts.add(name)
        array = x.array
        self._stats[name] = grading.level_stats(array, self.level)
        if linear.input_cut is not None:
            self._cuts[name], self._at_zero[name] = linear.input_cut, self._stats[name].bits
        wide = in_head(name) or linear.input_cut is not None  # as in ``Dense``
        y = Activations.of(linear.at_level(array, self.level, jnp.float32 if wide else None))
        return y if in_head(name) else y.astype(x.dtype)
