"""The divergence of a graded model from the original, and its gradient with respect to the level gains.

The divergence is ``KL(original || graded)``. The gradient treats the levels as constants: a gain multiplies
what its level reads, ``y = sum_l g_l (x at level l) W_l``, and the change of ``x`` in later layers rarely
moves a channel to another level.

One forward pass keeps the states between the layers, and one backward pass uses them. Memory holds the codes
of one layer and of the output projection, one dequantized level of one linear layer, and the states; the
vocabulary passes in ranges. If there is room, layers and the original's output projection stay in memory from
call to call.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.convert.graded_model import GradedHead, GradedModel, WindowStates
from checkpoints_tools.source.head import logits, with_logits
from checkpoints_tools.source.layer import VALUES_IN_MEMORY
from grinqh_jax.decoding.thresholds import interpolate
from grinqh_jax.model.apply import Dense
from grinqh_jax.model.decoder import DecoderLayer
from grinqh_jax.model.layer_spec import LogitTransform
from grinqh_jax.model.linear import GradedLinear, Linear
from pallas_kernels import NestedWeight, codes, grading, layout

LevelGains = Mapping[str, Float[Array, "p"]]
"""Gains of levels ``1..P``, by linear layer."""

_LEAST_DIVERGENCE = 1e-12
"""Divergence below which only rounding is left."""


class Setting(NamedTuple):
    """A setting of the dial.

    Attributes:
      targets: Mean bits of the rows of the threshold tables.
      bits: Mean bits to read.
    """

    targets: Float[Array, "targets"]
    bits: Float[Array, ""]


def divergence(
    model: GradedModel,
    head: GradedHead,
    states: WindowStates,
    level_gains: LevelGains,
    bits: Sequence[float],
) -> tuple[list[float], dict[str, Float[Array, "p"]]]:
    """Computes the divergence of each window and the gradient of the sum of the logarithms.

    Logarithms give all settings the same weight: at few bits the divergence is ten times as large as at many.

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
    targets = jnp.asarray(model.targets, jnp.float32)
    settings = [Setting(targets, jnp.float32(mean)) for mean in bits]
    inputs = [[jnp.asarray(window) for window in states.embedded]]
    for i in range(num_layers):
        layer, layer_gains = model.layer(i), _layer_gains(level_gains, i)
        rows = zip(settings, inputs[-1], strict=True)
        # Waits for each window; without that the codes of many layers would be in memory at once.
        inputs.append([_forward(layer, layer_gains, setting, x).block_until_ready() for setting, x in rows])
    divergences, back, gradients = _through_head(model, head, states, level_gains, settings, inputs.pop())
    for i in reversed(range(num_layers)):
        layer, layer_gains = model.layer(i), _layer_gains(level_gains, i)
        sums: dict[str, Array] = {}
        for s, (setting, x) in enumerate(zip(settings, inputs.pop(), strict=True)):
            back[s], by_gains = _backward(layer, layer_gains, setting, x, back[s])
            sums = jax.block_until_ready({name: sums.get(name, 0) + by_gains[name] for name in by_gains})
        gradients |= {f"layers.{i}.{projection}": total for projection, total in sums.items()}
    return divergences, {name: gradients[name] for name in level_gains}


def _layer_gains(level_gains: LevelGains, i: int) -> LevelGains:
    """Returns the level gains of layer ``i``, by projection."""
    prefix = f"layers.{i}."
    return {n.removeprefix(prefix): gains for n, gains in level_gains.items() if n.startswith(prefix)}


class _GradedWithGains(Dense):
    """An ``apply`` strategy for whole windows: graded, with given level gains, differentiable by them."""

    def __init__(self, level_gains: LevelGains, setting: Setting):
        self.level_gains, self.setting = level_gains, setting

    def product(self, name: str, linear: Linear, x: Float[Array, "b t k"]) -> Float[Array, "b t n"]:
        assert isinstance(linear, GradedLinear), "the layers of a graded model are graded"
        thresholds = interpolate(linear.thresholds[...], *self.setting)
        level_gains = self.level_gains[name.rpartition(".")[2]]
        y = graded_product(x, linear.weight, thresholds, level_gains)
        return (y if linear.bias is None else y + linear.bias[...]).astype(x.dtype)


def graded_product(
    x: Float[Array, "*rows k"],
    weight: NestedWeight,
    thresholds: Float[Array, "p"],
    level_gains: Float[Array, "p"],
) -> Float[Array, "*rows n"]:
    """Returns ``x @ W`` with each channel read at its level, float32.

    The result is differentiable with respect to ``x`` and ``level_gains``, with levels as constants.

    Args:
      x: Activations, any number of rows.
      weight: Weight; its own level gains are not used.
      thresholds: Thresholds of levels ``1..P``.
      level_gains: Factors of levels ``1..P``.
    """
    level = grading.levels(x, thresholds)
    plain = dataclasses.replace(weight, level_gains=None)

    def at_level(x, gain, read_level):
        inputs = jnp.where(level == read_level, x * gain, 0).astype(x.dtype)
        kernel = codes.dequantize(plain, read_level, x.dtype)
        return jnp.matmul(inputs, kernel, preferred_element_type=jnp.float32)

    # Dequantizes again in the backward pass: all levels of a layer are as large as four dense layers.
    at_level = jax.checkpoint(at_level, static_argnums=2)
    return sum(at_level(x, level_gains[i], i + 1) for i in range(weight.num_planes))


@jax.jit
def _forward(
    layer: DecoderLayer, level_gains: LevelGains, setting: Setting, x: Float[Array, "t d"]
) -> Float[Array, "t d"]:
    apply = _GradedWithGains(level_gains, setting)
    return layer("layer", x[None], jnp.arange(len(x))[None], apply)[0][0]


@jax.jit
def _backward(
    layer: DecoderLayer,
    level_gains: LevelGains,
    setting: Setting,
    x: Float[Array, "t d"],
    gradient: Float[Array, "t d"],
) -> tuple[Float[Array, "t d"], dict[str, Float[Array, "p"]]]:
    """Returns the gradients before a layer and by its level gains, given the gradient behind it."""
    _, pull_back = jax.vjp(lambda gains, x: _forward(layer, gains, setting, x), level_gains, x)
    by_gains, back = pull_back(gradient)
    return back, by_gains


def _through_head(
    model: GradedModel,
    head: GradedHead,
    states: WindowStates,
    level_gains: LevelGains,
    settings: Sequence[Setting],
    hidden: list[Array],
) -> tuple[list[float], list[Array], dict[str, Float[Array, "p"]]]:
    """Returns divergences, and gradients of their logarithms behind the last layer and by head gains."""
    rows, transform = max(hidden[0].shape), model.original.config.logit_transform
    normed, norm_pull_backs = zip(*(jax.vjp(head.norm, x) for x in hidden), strict=True)
    normalisers = [jnp.full(len(x), -jnp.inf, jnp.float32) for x in normed]
    for name, _, weight, table in _head_ranges(head, rows):
        for s, x in enumerate(normed):
            arguments = x, weight, table, level_gains[name], settings[s], transform
            normalisers[s] = _with_graded_logits(normalisers[s], *arguments).block_until_ready()
    divergences = [jnp.zeros(()) for _ in normed]
    back = [jnp.zeros(x.shape) for x in normed]
    by_gains = [{name: jnp.zeros_like(level_gains[name]) for name in head.blocks} for _ in normed]
    for name, outputs, weight, table in _head_ranges(head, rows):
        kernel = model.original_head(name, outputs)
        for s, x in enumerate(normed):
            exact = logits(states.exact[s], kernel, transform) - states.normalisers[s][:, None]
            arguments = x, weight, table, level_gains[name], settings[s], transform
            shares = jax.block_until_ready(_range_share(exact, normalisers[s], *arguments))
            divergences[s] += shares[0]
            back[s] += shares[1]
            by_gains[s][name] += shares[2]
    factors = [1 / jnp.maximum(d, _LEAST_DIVERGENCE) for d in divergences]
    gradients = {name: jnp.zeros_like(level_gains[name]) for name in head.blocks}
    for factor, gradient in zip(factors, by_gains, strict=True):
        gradients = {name: total + factor * gradient[name] for name, total in gradients.items()}
    back = [
        pull_back((factor * gradient).astype(x.dtype))[0]
        for pull_back, factor, gradient, x in zip(norm_pull_backs, factors, back, normed, strict=True)
    ]
    return [float(d) for d in divergences], back, gradients


def _output_ranges(outputs: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of whole tiles whose weights and logits fit ``VALUES_IN_MEMORY``."""
    size = max(VALUES_IN_MEMORY // rows // layout.TILE, 1) * layout.TILE
    for start in range(0, outputs, size):
        yield start, min(start + size, outputs)


def _head_ranges(
    head: GradedHead, rows: int
) -> Iterator[tuple[str, slice, NestedWeight, Float[Array, "targets p"]]]:
    """Yields the vocabulary blocks in ranges: name, outputs, their weight, threshold table."""
    for name, block in head.blocks.items():
        for start, stop in _output_ranges(block.out_features, rows):
            yield name, slice(start, stop), select_outputs(block.weight, start, stop), block.thresholds[...]


def select_outputs(weight: NestedWeight, start: int, stop: int) -> NestedWeight:
    """Returns a range of outputs; ``start`` begins a tile, ``stop`` ends a tile or the weight."""
    end = layout.round_up(stop, layout.TILE)
    words = slice(start // layout.WORD_DIGITS, end // layout.WORD_DIGITS)
    planes, scales = weight.planes[:, :, words], weight.scales[:, start:end]
    return NestedWeight(planes, scales, weight.in_features, stop - start, weight.level_gains)


@partial(jax.jit, static_argnames="transform")
def _with_graded_logits(
    normaliser: Float[Array, "t"],
    x: Float[Array, "t d"],
    weight: NestedWeight,
    table: Float[Array, "targets p"],
    level_gains: Float[Array, "p"],
    setting: Setting,
    transform: LogitTransform,
) -> Float[Array, "t"]:
    thresholds = interpolate(table, *setting)
    return with_logits(normaliser, transform(graded_product(x, weight, thresholds, level_gains)))


@partial(jax.jit, static_argnames="transform")
def _range_share(
    exact: Float[Array, "t n"],
    normaliser: Float[Array, "t"],
    x: Float[Array, "t d"],
    weight: NestedWeight,
    table: Float[Array, "targets p"],
    level_gains: Float[Array, "p"],
    setting: Setting,
    transform: LogitTransform,
) -> tuple[Float[Array, ""], Float[Array, "t d"], Float[Array, "p"]]:
    """Returns the share of a range of outputs in the divergence and in its gradients by ``x`` and the gains.

    Args:
      exact: Log-probabilities of the range's tokens in the original.
      normaliser: Log of the sum that the graded model's softmax divides by.
      x: Normed hidden states of the graded model.
      weight: Weight of the range.
      table: Threshold table of its vocabulary block.
      level_gains: Level gains of its vocabulary block.
      setting: Setting of the dial.
      transform: Function from outputs to logits.
    """
    thresholds = interpolate(table, *setting)

    def graded_logits(x, gains):
        return transform(graded_product(x, weight, thresholds, gains))

    graded, pull_back = jax.vjp(graded_logits, x, level_gains)
    log_p = graded - normaliser[:, None]
    first = first_scored_position(len(x))
    share = (jnp.arange(len(x)) >= first)[:, None] / (len(x) - first)
    total = jnp.sum(share * jnp.exp(exact) * (exact - log_p))
    back, by_gains = pull_back(share * (jnp.exp(log_p) - jnp.exp(exact)))
    return total, back.astype(jnp.float32), by_gains
