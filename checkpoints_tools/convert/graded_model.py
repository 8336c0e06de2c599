"""A graded model and its original, read layer by layer, and windows of text in both."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from checkpoints_tools.convert.coded_experts import CodedExperts
from checkpoints_tools.convert.coded_linear import CodedLinear
from checkpoints_tools.source.array_cache import ArrayCache
from checkpoints_tools.source.head import logits, normed, vocabulary, with_logits
from checkpoints_tools.source.layer import dense_layer, embed, read_layer
from checkpoints_tools.source.passes import each_group, pass_windows
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.decoder_layer import DecoderLayer, RMSNorm
from grinqh_jax.model.experts import GradedExperts, build_experts
from grinqh_jax.model.layer_spec import HEAD, Projection
from grinqh_jax.model.linear import GradedLinear, build_linear
from grinqh_jax.model.output_projection import block_shapes
from grinqh_jax.model.parameters import axis_sizes


class GradedHead(NamedTuple):
    """A graded output projection: the norm before it, and its vocabulary blocks by name."""

    norm: RMSNorm
    blocks: Mapping[str, CodedLinear]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GradedModel:
    """A graded model whose level gains are all 1, and its original.

    Attributes:
      original: Original checkpoint.
      embedding: Checkpoint that the graded model's embedding is read from.
      read: Reads the subtree of the graded model's state at a dotted name, such as ``layers.0``.
      vocabulary_blocks: Tokens of each vocabulary block, by name, in the order of its outputs.
      targets: Mean bits of the rows of the threshold tables.
      compute_dtype: Dtype of hidden states and products.
      cache: Cache of the layers and of the original's output projection.
    """

    original: HFCheckpoint
    embedding: Any
    read: Callable[[str], Mapping[str, Any]]
    vocabulary_blocks: Mapping[str, Int[np.ndarray, "_"]]
    targets: Sequence[float]
    compute_dtype: Any
    cache: ArrayCache = dataclasses.field(default_factory=ArrayCache)

    def layer(self, i: int) -> DecoderLayer:
        """Returns graded layer ``i``; its projections are ``CodedLinear`` or ``CodedExperts``."""

        def read() -> DecoderLayer:
            config, prefix = self.original.config, f"layers.{i}."
            spec = config.layers[i]
            keys = [key.removeprefix(prefix) for key in self.original.parameters if key.startswith(prefix)]
            names = {key.partition(".")[0] for key in keys}.difference(spec.names)
            # Projections follow one after another, so that the planes of one are in memory.
            tree: dict[str, Any] = {
                p.name: {"kernel": np.zeros((0,) * (2 + p.of_experts))} for p in spec.projections
            }
            tree |= {name: self.read(prefix + name) for name in names}
            layer = DecoderLayer(config, spec, tree, self.compute_dtype)
            for projection in spec.projections:
                setattr(layer, projection.name, self._coded(prefix, projection))
            return layer

        return self.cache(f"layers.{i}", read)

    def _coded(self, prefix: str, projection: Projection) -> CodedLinear | CodedExperts:
        tree = _with_unit_gains(self.read(prefix + projection.name))
        shape = projection.shape(axis_sizes(self.original.config))
        if projection.of_experts:
            experts = build_experts(tree, shape)
            assert isinstance(experts, GradedExperts), "the tree has planes"
            return CodedExperts.of_planes(experts)
        linear = build_linear(tree, shape, self.compute_dtype)
        assert isinstance(linear, GradedLinear), "the tree has planes"
        return CodedLinear.of_planes(linear)

    def head(self) -> GradedHead:
        """Returns the graded output projection."""
        config = self.original.config
        shapes = block_shapes(config.hidden_size, config.vocab_size)
        trees = self.read(HEAD)["blocks"]
        blocks = {}
        for i, (name, shape) in enumerate(shapes.items()):
            block = build_linear(_with_unit_gains(trees[str(i)]), shape, self.compute_dtype)
            assert isinstance(block, GradedLinear), "the tree has planes"
            blocks[name] = CodedLinear.of_planes(block)
        scale = self.read(config.final_norm.name)["scale"]
        return GradedHead(RMSNorm(scale, config.rms_norm_eps), blocks)

    def original_head(self, name: str, outputs: slice) -> Float[Array, "d n"]:
        """Returns the original's weights of some outputs of a vocabulary block."""
        key, tokens = f"{HEAD}.kernel", self.vocabulary_blocks[name][outputs]
        return self.cache(f"{name} {outputs}", lambda: jnp.asarray(self.original.read(key, tokens)))


def _with_unit_gains(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {**tree, "gains": jnp.ones(tree["planes"].shape[-3])}


@dataclasses.dataclass(frozen=True, eq=False)
class WindowStates:
    """States of windows of text before the first layer of the graded model, and after the original.

    Attributes:
      embedded: Hidden states before the first layer of the graded model.
      exact: Hidden states after the final norm of the original.
      normalisers: Log-normalisers of the original's softmax at each position, float32.
    """

    embedded: Float[np.ndarray, "s t d"]
    exact: Float[np.ndarray, "s t d"]
    normalisers: Float[np.ndarray, "s t"]

    @classmethod
    def compute(cls, model: GradedModel, windows: Int32[np.ndarray, "s t"]) -> "WindowStates":
        """Runs windows of token ids through the original, with one layer in memory."""
        original, dtype = model.original, model.compute_dtype
        exact = embed(original, windows, dtype)
        for i in range(original.config.num_layers):
            layer = dense_layer(original, i, *read_layer(original, i, experts=False), dtype)
            pass_windows(layer, exact, each_group(original, i, layer))
            del layer  # Frees it before the next one is read.
        config = original.config
        norm = RMSNorm(jnp.asarray(original.read(f"{config.final_norm.name}.scale")), config.rms_norm_eps)
        normalisers = np.full(windows.shape, -np.inf, np.float32)
        for window in exact:
            window[...] = normed(norm, window)
        for _, kernel in vocabulary(original, windows.shape[1]):
            for normaliser, window in zip(normalisers, exact, strict=True):
                exact_logits = logits(window, kernel, config.logit_transform)
                normaliser[...] = with_logits(normaliser, exact_logits)
        return cls(embed(model.embedding, windows, dtype), exact, normalisers)

    def at(self, chosen: Int[np.ndarray, "n"]) -> "WindowStates":
        """Returns the chosen windows."""
        return WindowStates(self.embedded[chosen], self.exact[chosen], self.normalisers[chosen])
