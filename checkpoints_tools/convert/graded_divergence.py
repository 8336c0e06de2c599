"""How far a graded model's predictions are from the original's, and the gradient of that by its gains.

The divergence is ``KL(original || graded)``. Gradients take the levels as constants: a gain multiplies what
its level reads, ``y = sum_l g_l (x at level l) W_l``, and what it changes in ``x`` further on changes there
which level a channel gets only now and then.

One pass forward, which keeps the states between the layers, and one back. Memory holds the codes of one
layer and of the output projection, one dequantized level of one linear layer, and the states; the vocabulary
goes by in pieces. Where there is more, layers and the original's vocabulary stay in it from call to call.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.source.array_cache import ArrayCache
from checkpoints_tools.source.head import logits, vocabulary, with_logits
from checkpoints_tools.source.layer import BLOCK_VALUES, dense_layer, embed, read_layer, run_layer
from grinqh_jax.decoding.thresholds import interpolate
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.apply import HEAD, Dense
from grinqh_jax.model.decoder import LAYER_LINEARS, DecoderLayer, RMSNorm
from grinqh_jax.model.linear import GradedLinear, linear_of
from grinqh_jax.model.output_projection import block_shapes
from pallas_kernels import NestedWeight, codes, grading, layout

Gains = Mapping[str, Float[Array, "p"]]
"""By linear layer: of each level above 0."""

_LEAST = 1e-12
"""Divergence: what is less is rounding."""


@dataclasses.dataclass(frozen=True)
class GradedParts:
    """A graded model without gains, and the original that it comes from, a piece at a time.

    Attributes:
      original: the checkpoint.
      embedding: what ``source_layer.embed`` reads the graded model's embedding from.
      read_part: gives the state tree of ``layers.{i}``, or of the output projection and the norm before it.
      tokens: of each block of the output projection, by name: which ones its outputs are the logits of.
      targets: mean bits of the rows of the threshold tables.
      compute_dtype: of hidden states and products.
      kept: what has been read and stays in memory.
    """

    original: HFCheckpoint
    embedding: Any
    read_part: Callable[[str], Mapping[str, Any]]
    tokens: Mapping[str, Int[np.ndarray, "n"]]
    targets: Sequence[float]
    compute_dtype: Any
    kept: ArrayCache = dataclasses.field(default_factory=ArrayCache)

    def layer(self, i: int) -> DecoderLayer:
        """Layer ``i``, all its gains 1."""

        def read() -> DecoderLayer:
            tree = self.read_part(f"layers.{i}")["layers"][str(i)]
            ungained = {part: _ungained(tree[part]) for part in LAYER_LINEARS}
            return DecoderLayer(self.original.config, {**tree, **ungained}, self.compute_dtype)

        return self.kept(f"layers.{i}", read)

    def original_head(self, name: str, outputs: slice) -> Float[Array, "d n"]:
        """The original's kernel of some outputs of a block of the output projection."""
        key, tokens = f"{HEAD}.kernel", self.tokens[name][outputs]
        return self.kept(f"{name} {outputs}", lambda: jnp.asarray(self.original.read(key, tokens)))

    def head(self) -> "Head":
        """The output projection, all its gains 1."""
        config, tree = self.original.config, self.read_part(HEAD)
        shapes = block_shapes(config.hidden_size, config.vocab_size)
        blocks = tree[HEAD]["blocks"]
        linears = {
            name: linear_of(_ungained(blocks[str(i)]), shape, self.compute_dtype)
            for i, (name, shape) in enumerate(shapes.items())
        }
        return Head(RMSNorm(tree["norm"]["scale"], config.rms_norm_eps), linears)


def _ungained(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {**tree, "gains": jnp.ones(len(tree["planes"]))}


class Head(NamedTuple):
    """A graded output projection: the norm before it, and its blocks by name."""

    norm: RMSNorm
    blocks: Mapping[str, GradedLinear]


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of text, as the graded model begins with them and the original ends with them.

    Attributes:
      embedded: hidden states before the first layer of the graded model.
      exact: states behind the last norm of the original.
      normalisers: float32, logarithms of the sums that the original's softmax divides by.
    """

    embedded: Float[np.ndarray, "s t d"]
    exact: Float[np.ndarray, "s t d"]
    normalisers: Float[np.ndarray, "s t"]

    @classmethod
    def read(cls, graded: GradedParts, windows: Int32[np.ndarray, "s t"]) -> "Text":
        """Takes windows of token ids through the original, one layer at a time."""
        original, dtype = graded.original, graded.compute_dtype
        exact = embed(original, windows, dtype)
        for i in range(original.config.num_layers):
            layer = dense_layer(original, *read_layer(original, i), dtype)
            for window in exact:
                window[...] = run_layer(layer, window)
            del layer  # or it would be in memory beside the next one
        norm = RMSNorm(jnp.asarray(original.read("norm.scale")), original.config.rms_norm_eps)
        normalisers = np.full(windows.shape, -np.inf, np.float32)
        for window in exact:
            window[...] = norm(jnp.asarray(window))
        for _, kernel in vocabulary(original, windows.shape[1]):
            for normaliser, window in zip(normalisers, exact, strict=True):
                normaliser[...] = with_logits(normaliser, logits(window, kernel))
        return cls(embed(graded.embedding, windows, dtype), exact, normalisers)

    def at(self, chosen: Int[np.ndarray, "n"]) -> "Text":
        """Some of the windows."""
        return Text(self.embedded[chosen], self.exact[chosen], self.normalisers[chosen])


def divergence(
    graded: GradedParts, head: Head, text: Text, gains: Gains, settings: Sequence[float]
) -> tuple[list[float], dict[str, Float[Array, "p"]]]:
    """The divergence of the predictions at some windows, and the gradient of the sum of its logarithms.

    Of the logarithms, because at few bits it is ten times what it is at many, and all settings count alike.

    Args:
      graded: the model.
      head: its own (read once for many calls).
      text: windows, as many as there are settings.
      gains: of all linear layers.
      settings: mean bits that each window is read with.

    Returns:
      For each window the mean of ``KL(original || graded)`` over its positions but the first few
      (``first_scored_position``), in nats; and the gradient of the sum of their logarithms by each gain.
    """
    num_layers = graded.original.config.num_layers
    targets = jnp.asarray(graded.targets, jnp.float32)
    dials = [Dial(targets, jnp.float32(bits)) for bits in settings]
    states = [[jnp.asarray(window) for window in text.embedded]]
    for i in range(num_layers):
        layer, own = graded.layer(i), _own(gains, i)
        rows = zip(dials, states[-1], strict=True)
        # Waited for, or the codes of many layers would be in memory at once.
        states.append([_forward(layer, own, dial, x).block_until_ready() for dial, x in rows])
    divergences, back, gradients = _through_head(graded, head, text, gains, dials, states.pop())
    for i in reversed(range(num_layers)):
        layer, own = graded.layer(i), _own(gains, i)
        sums: dict[str, Array] = {}
        for s, (dial, x) in enumerate(zip(dials, states.pop(), strict=True)):
            back[s], found = _backward(layer, own, dial, x, back[s])
            sums = jax.block_until_ready({part: sums.get(part, 0) + found[part] for part in found})
        gradients |= {f"layers.{i}.{part}": sums[part] for part in LAYER_LINEARS}
    return divergences, {name: gradients[name] for name in gains}


def _own(gains: Gains, i: int) -> Gains:
    return {part: gains[f"layers.{i}.{part}"] for part in LAYER_LINEARS}


class Dial(NamedTuple):
    """A setting: mean ``bits`` of threshold tables for ``targets``."""

    targets: Float[Array, "targets"]
    bits: Float[Array, ""]


class _Graded(Dense):
    """An ``apply`` strategy for whole windows: graded, with given gains, and with a way back to them."""

    def __init__(self, gains: Gains, dial: Dial):
        self.gains, self.dial = gains, dial

    def product(self, name: str, linear: GradedLinear, x: Float[Array, "b t k"]) -> Float[Array, "b t n"]:
        thresholds = interpolate(linear.thresholds[...], *self.dial)
        gains = self.gains[name.rpartition(".")[2]]
        return graded_product(x, linear.weight, thresholds, gains).astype(x.dtype)


def graded_product(
    x: Float[Array, "*rows k"], weight: NestedWeight, thresholds: Float[Array, "p"], gains: Float[Array, "p"]
) -> Float[Array, "*rows n"]:
    """``x @ W``, each channel read at its level, level ``l`` times ``gains[l - 1]``; float32.

    It may be differentiated with respect to x and gains, levels taken as constants.

    Args:
      x: activations, any number of rows.
      weight: its own gains are not used.
      thresholds: of the levels.
      gains: of the levels above 0.
    """
    level = grading.levels(x, thresholds)
    plain = dataclasses.replace(weight, level_gains=None)

    def at_level(x, gain, of_level):
        here = jnp.where(level == of_level, x * gain, 0).astype(x.dtype)
        kernel = codes.dequantize(plain, of_level, x.dtype)
        return jnp.matmul(here, kernel, preferred_element_type=jnp.float32)

    # Not kept for the way back: all levels of a layer are as large as four dense ones.
    at_level = jax.checkpoint(at_level, static_argnums=2)
    return sum(at_level(x, gains[i], i + 1) for i in range(weight.num_planes))


@jax.jit
def _forward(layer: DecoderLayer, gains: Gains, dial: Dial, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    return layer("layer", x[None], jnp.arange(len(x))[None], _Graded(gains, dial))[0][0]


@jax.jit
def _backward(
    layer: DecoderLayer, gains: Gains, dial: Dial, x: Float[Array, "t d"], gradient: Float[Array, "t d"]
) -> tuple[Float[Array, "t d"], dict[str, Float[Array, "p"]]]:
    """From the gradient behind a layer to that before it, and those of its gains."""
    _, pull_back = jax.vjp(lambda gains, x: _forward(layer, gains, dial, x), gains, x)
    of_gains, back = pull_back(gradient)
    return back, of_gains


def _through_head(
    graded: GradedParts, head: Head, text: Text, gains: Gains, dials: Sequence[Dial], states: list[Array]
) -> tuple[list[float], list[Array], dict[str, Float[Array, "p"]]]:
    """Divergences, and gradients of their logarithms' sum: behind the last layer, and by the head's gains."""
    rows = max(states[0].shape)
    normed, ways_back = zip(*(jax.vjp(head.norm, x) for x in states), strict=True)
    normalisers = [jnp.full(len(x), -jnp.inf, jnp.float32) for x in normed]
    for name, _, weight, table in _head_pieces(head, rows):
        for s, x in enumerate(normed):
            arguments = x, weight, table, gains[name], dials[s]
            normalisers[s] = _with_graded_logits(normalisers[s], *arguments).block_until_ready()
    divergences = [jnp.zeros(()) for _ in normed]
    back = [jnp.zeros(x.shape) for x in normed]
    by_gains = [{name: jnp.zeros_like(gains[name]) for name in head.blocks} for _ in normed]
    for name, outputs, weight, table in _head_pieces(head, rows):
        kernel = graded.original_head(name, outputs)
        for s, x in enumerate(normed):
            exact = logits(text.exact[s], kernel) - text.normalisers[s][:, None]
            arguments = x, weight, table, gains[name], dials[s]
            found = jax.block_until_ready(_piece(exact, normalisers[s], *arguments))
            divergences[s] += found[0]
            back[s] += found[1]
            by_gains[s][name] += found[2]
    shares = [1 / jnp.maximum(d, _LEAST) for d in divergences]
    gradients = {
        name: sum(share * found[name] for share, found in zip(shares, by_gains, strict=True))
        for name in head.blocks
    }
    back = [
        way_back((share * gradient).astype(x.dtype))[0]
        for way_back, share, gradient, x in zip(ways_back, shares, back, normed, strict=True)
    ]
    return [float(d) for d in divergences], back, gradients


def _pieces(outputs: int, rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole tiles, such that neither their weights nor their logits are many."""
    piece = max(BLOCK_VALUES // rows // layout.TILE, 1) * layout.TILE
    for start in range(0, outputs, piece):
        yield start, min(start + piece, outputs)


def _head_pieces(
    head: Head, rows: int
) -> Iterator[tuple[str, slice, NestedWeight, Float[Array, "targets p"]]]:
    """The blocks in pieces: the block's name, which of its outputs, their weights, its threshold table."""
    for name, block in head.blocks.items():
        for start, stop in _pieces(block.out_features, rows):
            yield name, slice(start, stop), columns(block.weight, start, stop), block.thresholds[...]


def columns(weight: NestedWeight, start: int, stop: int) -> NestedWeight:
    """The outputs from ``start``, the first of a tile, to ``stop``, the end of one or of the weight."""
    end = layout.round_up(stop, layout.TILE)
    words = slice(start // layout.WORD_DIGITS, end // layout.WORD_DIGITS)
    planes, scales = weight.planes[:, :, words], weight.scales[:, start:end]
    return NestedWeight(planes, scales, weight.in_features, stop - start, weight.level_gains)


@jax.jit
def _with_graded_logits(
    normaliser: Float[Array, "t"],
    x: Float[Array, "t d"],
    weight: NestedWeight,
    table: Float[Array, "targets p"],
    gains: Float[Array, "p"],
    dial: Dial,
) -> Float[Array, "t"]:
    return with_logits(normaliser, graded_product(x, weight, interpolate(table, *dial), gains))


@jax.jit
def _piece(
    exact: Float[Array, "t n"],
    normaliser: Float[Array, "t"],
    x: Float[Array, "t d"],
    weight: NestedWeight,
    table: Float[Array, "targets p"],
    gains: Float[Array, "p"],
    dial: Dial,
) -> tuple[Float[Array, ""], Float[Array, "t d"], Float[Array, "p"]]:
    """What some outputs add to the divergence, and to its gradients by ``x`` and ``gains``.

    Args:
      exact: logarithms of the original's probabilities of their tokens.
      normaliser: of the graded model's softmax.
    """
    thresholds = interpolate(table, *dial)
    read, pull_back = jax.vjp(lambda x, gains: graded_product(x, weight, thresholds, gains), x, gains)
    log_p = read - normaliser[:, None]
    first = first_scored_position(len(x))
    share = (jnp.arange(len(x)) >= first)[:, None] / (len(x) - first)
    found = jnp.sum(share * jnp.exp(exact) * (exact - log_p))
    back, of_gains = pull_back(share * (jnp.exp(log_p) - jnp.exp(exact)))
    return found, back.astype(jnp.float32), of_gains
