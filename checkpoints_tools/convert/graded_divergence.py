"""The divergence of a graded model from the original, and its gradient with respect to the level gains.

The divergence is ``KL(original || graded)``. A gain multiplies the weights of its level,
``y = sum_l g_l (x at level l) W_l``. It also changes ``x`` in later layers, which rarely moves a channel to
another level, so the gradient treats the levels as constants.

One forward pass keeps the states between the layers, and one backward pass uses them. All windows run
together, so each level of a layer is dequantized once. Memory holds the codes of one layer and of the output
projection, the dequantized levels of one linear layer, and the states; the vocabulary is read in ranges. If
there is room, layers and the original's output projection stay in memory from call to call, and the outputs
of the projections stay from the forward to the backward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.convert.coded_experts import ChosenCoded
from checkpoints_tools.convert.coded_linear import CodedLinear
from checkpoints_tools.convert.graded_model import GradedHead, GradedModel, WindowStates
from checkpoints_tools.source.array_cache import free_bytes
from checkpoints_tools.source.head import back_through_norm, logits, normed, with_logits
from checkpoints_tools.source.layer import VALUES_IN_MEMORY
from grinqh_jax.decoding.thresholds import interpolate
from grinqh_jax.model.decoder_layer import DecoderLayer
from grinqh_jax.model.logit_transform import LogitTransform
from pallas_kernels import Activations, layout

LevelGains = Mapping[str, Float[Array, "p"]]
"""Gains of levels ``1..P``, by linear layer."""

Outputs = Mapping[str, Float[Array, "s t ... n"]]
"""Outputs of the projections of a layer, by projection."""

LOGITS_IN_MEMORY = 1 << 27
"""Number of logits that stay in memory between the two passes over the vocabulary: 512 MiB."""

_LEAST_DIVERGENCE = 1e-12
"""Lower limit of the divergence in its gradient; smaller divergences are rounding errors."""


class Settings(NamedTuple):
    """Settings of the dial, one for each window.

    Attributes:
      targets: Mean bits of the rows of the threshold tables.
      bits: Mean bits that each window is read with.
    """

    targets: Float[Array, "targets"]
    bits: Float[Array, "s"]

    def thresholds(self, table: Float[Array, "targets p"]) -> Float[Array, "s 1 p"]:
        """Returns the thresholds of a linear layer for each window."""
        return interpolate(table, self.targets, self.bits)[:, None]


def divergence(
    model: GradedModel,
    head: GradedHead,
    states: WindowStates,
    level_gains: LevelGains,
    bits: Sequence[float],
) -> tuple[list[float], dict[str, Float[Array, "p"]]]:
    """Computes the divergence of each window and the gradient of the sum of the logarithms.

    Logarithms give all settings the same weight, although the divergence at few bits is ten times as large as
    at many.

    Args:
      model: Graded model and its original.
      head: ``model.head()``, read once for many calls.
      states: States of as many windows as there are settings.
      level_gains: Level gains of all linear layers.
      bits: Mean bits that each window is read with.

    Returns:
      ``(divergences, gradient)``: for each window the mean of ``KL(original || graded)`` over its scored
      positions (``first_scored_position``), in nats; and the gradient of the sum of their logarithms with
      respect to each gain, by linear layer.
    """
    num_layers = model.original.config.num_layers
    settings = Settings(jnp.asarray(model.targets, jnp.float32), jnp.asarray(bits, jnp.float32))
    inputs: list[Array] = [jnp.asarray(states.embedded)]
    kept: list[Outputs | None] = []
    room = free_bytes() // 2
    for i in range(num_layers):
        # Waits for each layer; without that the codes of many layers would be in memory at once.
        x, outputs = jax.block_until_ready(
            _forward(model.layer(i), _layer_gains(level_gains, i), settings, inputs[-1])
        )
        inputs.append(x)
        room -= sum(output.nbytes for output in outputs.values())
        kept.append(outputs if room >= 0 else None)
    divergences, back, gradients = _head_divergence(model, head, states, level_gains, settings, inputs.pop())
    for i in reversed(range(num_layers)):
        layer, layer_gains, x = model.layer(i), _layer_gains(level_gains, i), inputs.pop()
        outputs = kept.pop() or _forward(layer, layer_gains, settings, x)[1]
        back, by_gains = jax.block_until_ready(_backward(layer, layer_gains, settings, x, outputs, back))
        gradients |= {f"layers.{i}.{projection}": gradient for projection, gradient in by_gains.items()}
        del layer  # Frees it before the next one is read.
    return [float(d) for d in divergences], {name: gradients[name] for name in level_gains}


def _layer_gains(level_gains: LevelGains, i: int) -> LevelGains:
    """Returns the level gains of layer ``i``, by projection."""
    prefix = f"layers.{i}."
    return {n.removeprefix(prefix): gains for n, gains in level_gains.items() if n.startswith(prefix)}


class _GradedWithGains:
    """An apply strategy for whole windows: graded with given level gains, and differentiable in them.

    Attributes:
      outputs: Outputs of the projections, by projection. Those that are given are not computed again.
    """

    def __init__(self, level_gains: LevelGains, settings: Settings, outputs: Outputs | None = None):
        self.level_gains, self.settings = level_gains, settings
        self.outputs: dict[str, Array] = dict(outputs or {})

    def __call__(self, name: str, linear: Any, x: Activations) -> Activations:
        assert isinstance(linear, CodedLinear | ChosenCoded), "the layers of a graded model are coded"
        projection, inputs = name.rpartition(".")[2], x.array
        y = linear.graded(
            inputs,
            self.settings.thresholds(linear.thresholds[...]),
            self.level_gains[projection],
            self.outputs.get(projection),
        )
        self.outputs[projection] = y.astype(inputs.dtype)
        return Activations.of(self.outputs[projection])


def _run(layer: DecoderLayer, x: Float[Array, "s t d"], apply: _GradedWithGains) -> Float[Array, "s t d"]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return layer("layer", x, positions, apply)[0]


@jax.jit
def _forward(
    layer: DecoderLayer, level_gains: LevelGains, settings: Settings, x: Float[Array, "s t d"]
) -> tuple[Float[Array, "s t d"], Outputs]:
    """Returns the states after a layer and the outputs of its projections."""
    apply = _GradedWithGains(level_gains, settings)
    return _run(layer, x, apply), apply.outputs


@jax.jit(donate_argnums=5)
def _backward(
    layer: DecoderLayer,
    level_gains: LevelGains,
    settings: Settings,
    x: Float[Array, "s t d"],
    outputs: Outputs,
    gradient: Float[Array, "s t d"],
) -> tuple[Float[Array, "s t d"], dict[str, Float[Array, "p"]]]:
    """Returns the gradients at a layer's inputs and of its level gains, given that at its outputs."""

    def run(gains, x):
        return _run(layer, x, _GradedWithGains(gains, settings, outputs))

    _, pull_back = jax.vjp(run, level_gains, x)
    by_gains, back = pull_back(gradient)
    return back, by_gains


def _head_divergence(
    model: GradedModel,
    head: GradedHead,
    states: WindowStates,
    level_gains: LevelGains,
    settings: Settings,
    hidden: Float[Array, "s t d"],
) -> tuple[Float[Array, "s"], Float[Array, "s t d"], dict[str, Float[Array, "p"]]]:
    """Returns the divergences, and the gradients of the sum of their logarithms.

    These are gradients with respect to the outputs of the last layer, and to the level gains of the head by
    vocabulary block.

    The first pass over the vocabulary computes the divergences, the second one the gradients.
    """
    behind, transform = normed(head.norm, hidden), model.original.config.logit_transform
    exact_hidden, exact_normaliser = jnp.asarray(states.exact), jnp.asarray(states.normalisers)
    total = _Totals(jnp.full(behind.shape[:2], -jnp.inf, jnp.float32), jnp.zeros(behind.shape[:2]))
    in_memory = 2 * behind.shape[0] * behind.shape[1] * model.original.config.vocab_size <= LOGITS_IN_MEMORY
    kept: dict[tuple[str, int], tuple[Array, Array]] = {}
    ranges = list(_head_ranges(head, max(behind.shape[0] * behind.shape[1], behind.shape[2])))

    def range_outputs(name: str, start: int, stop: int) -> tuple[Array, Array]:
        kernel, block = model.original_head(name, slice(start, stop)), head.blocks[name].select(start, stop)
        arguments = kernel, behind, block, level_gains[name], settings, transform
        return _range_outputs(exact_hidden, exact_normaliser, *arguments)

    for name, start, stop in ranges:
        both = range_outputs(name, start, stop)
        total = jax.block_until_ready(_add_range(total, *both, transform))
        if in_memory:
            kept[name, start] = both
    divergences, factor = _divergences(total)
    back = jnp.zeros(behind.shape, jnp.float32)
    gradients = {name: jnp.zeros_like(level_gains[name]) for name in head.blocks}
    for name, start, stop in ranges:
        exact, graded = kept.pop((name, start)) if in_memory else range_outputs(name, start, stop)
        block, gains = head.blocks[name].select(start, stop), level_gains[name]
        arguments = exact, graded, factor, total.normaliser, behind, block, gains, settings, transform
        back, gradients[name] = jax.block_until_ready(_add_gradients(back, gradients[name], *arguments))
    return divergences, back_through_norm(head.norm, hidden, back), gradients


def _head_ranges(head: GradedHead, rows: int) -> Iterator[tuple[str, int, int]]:
    """Yields ranges of the vocabulary blocks: name, first output, end.

    Ranges are whole tiles whose weights and logits fit ``VALUES_IN_MEMORY``. The ranges of a block have equal
    lengths, if possible, so that they share compiled programs.
    """
    most = max(VALUES_IN_MEMORY // rows // layout.TILE, 1) * layout.TILE
    for name, block in head.blocks.items():
        outputs = block.out_features
        size = layout.round_up(-(-outputs // -(-outputs // most)), layout.TILE)
        for start in range(0, outputs, size):
            yield name, start, min(start + size, outputs)


class _Totals(NamedTuple):
    """Sums over the vocabulary at each position.

    Attributes:
      normaliser: Log-normaliser of the graded model's softmax.
      difference: Sum of ``p (log p - g)``, with the original's ``p`` and the graded logits ``g``.
    """

    normaliser: Float[Array, "s t"]
    difference: Float[Array, "s t"]


@partial(jax.jit, static_argnames="transform")
def _range_outputs(
    exact_hidden: Float[Array, "s t d"],
    exact_normaliser: Float[Array, "s t"],
    kernel: Float[Array, "d n"],
    x: Float[Array, "s t d"],
    block: CodedLinear,
    level_gains: Float[Array, "p"],
    settings: Settings,
    transform: LogitTransform,
) -> tuple[Float[Array, "s t n"], Float[Array, "s t n"]]:
    """Returns log-probabilities of the original, and outputs of the graded model, in a range of outputs."""
    exact = logits(exact_hidden, kernel, transform) - exact_normaliser[..., None]
    return exact, block.graded(x, settings.thresholds(block.thresholds[...]), level_gains)


@partial(jax.jit, static_argnames="transform")
def _add_range(
    total: _Totals,
    exact: Float[Array, "s t n"],
    graded: Float[Array, "s t n"],
    transform: LogitTransform,
) -> _Totals:
    """Adds the result of ``_range_outputs`` for one range."""
    graded_logits = transform(graded)
    difference = jnp.sum(jnp.exp(exact) * (exact - graded_logits), axis=-1)
    return _Totals(with_logits(total.normaliser, graded_logits), total.difference + difference)


@jax.jit
def _divergences(total: _Totals) -> tuple[Float[Array, "s"], Float[Array, "s t"]]:
    """Returns the divergence of each window, and each position's factor in the gradient of the logarithms."""
    length = total.normaliser.shape[1]
    first = first_scored_position(length)
    share = (jnp.arange(length) >= first) / (length - first)
    divergences = jnp.sum(share * (total.normaliser + total.difference), axis=-1)
    return divergences, share / jnp.maximum(divergences, _LEAST_DIVERGENCE)[:, None]


@partial(jax.jit, static_argnames="transform", donate_argnums=0)
def _add_gradients(
    back: Float[Array, "s t d"],
    by_gains: Float[Array, "p"],
    exact: Float[Array, "s t n"],
    graded: Float[Array, "s t n"],
    factor: Float[Array, "s t"],
    normaliser: Float[Array, "s t"],
    x: Float[Array, "s t d"],
    block: CodedLinear,
    level_gains: Float[Array, "p"],
    settings: Settings,
    transform: LogitTransform,
) -> tuple[Float[Array, "s t d"], Float[Array, "p"]]:
    """Adds the share of a range of outputs to the gradients with respect to ``x`` and the level gains.

    Args:
      back, by_gains: Gradients of other ranges.
      exact, graded: Result of ``_range_outputs``.
      factor: See ``_divergences``.
      normaliser: Log-normaliser of the graded model's softmax.
      x: Normed hidden states of the graded model.
      block, level_gains, settings: The range, its level gains, the settings of the dial.
      transform: Function from outputs to logits.
    """
    thresholds = settings.thresholds(block.thresholds[...])

    def graded_logits(x, gains):
        return transform(block.graded(x, thresholds, gains, graded))

    values, pull_back = jax.vjp(graded_logits, x, level_gains)
    change = jnp.exp(values - normaliser[..., None]) - jnp.exp(exact)
    more, more_by_gains = pull_back(factor[..., None] * change)
    return back + more.astype(jnp.float32), by_gains + more_by_gains
