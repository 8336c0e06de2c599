"""The decoder-only transformer of Llama 3 and Qwen3, as Flax NNX modules.

Modules hold arrays and static shapes only, so a ``Decoder`` is a pytree that goes through ``jit`` as
an argument. How its linear layers are computed is the caller's choice (see ``apply``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from grinqh_jax.model.apply import HEAD, Apply, Dense, of_head
from grinqh_jax.model.attention import KeyValues, attend_heads
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.linear import CHECKPOINT_ATTRIBUTES, GradedLinear, Linear, linear_of
from grinqh_jax.model.norm import add_norm, rms_norm
from grinqh_jax.model.output_projection import OutputProjection, block_shapes
from grinqh_jax.model.swiglu import swiglu
from pallas_kernels import Activations, NestedWeight

LAYER_LINEARS = ("qkv", "o", "gate_up", "down")
"""The linear layers of one decoder layer, in the order in which they run."""

Tree = Mapping[str, Any]
"""A nested dict of arrays with string keys: the state of a module."""


class Embedding(nnx.Module):
    """Token embeddings ``[vocab, hidden]``."""

    def __init__(self, embedding: Float[Array, "v d"]):
        self.embedding = nnx.Param(embedding)

    @jax.named_scope("embed")
    def __call__(self, tokens: Int[Array, "b t"], dtype) -> Float[Array, "b t d"]:
        return self.embedding[...][tokens].astype(dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x**2) + eps) * scale`` over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, scale: Float[Array, "d"], eps: float):
        self.scale = nnx.Param(scale)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        return rms_norm(x, self.scale[...], self.eps)

    def add(
        self, x: Float[Array, "b t d"], update: Activations | None
    ) -> tuple[Float[Array, "b t d"], Activations]:
        """``(x + update, its norm)``, see ``norm.add_norm``."""
        return add_norm(x, update, self.scale[...], self.eps)


class DecoderLayer(nnx.Module):
    """One pre-norm layer: grouped-query attention with rotary positions, then a SwiGLU MLP.

    Attributes:
      qkv: projections to queries, keys and values, concatenated along the outputs.
      gate_up: the MLP's gate and up projections, concatenated along the outputs.
      q_norm, k_norm: norms of each query and key head (Qwen3), or None.
    """

    def __init__(self, config: ModelConfig, tree: Tree, compute_dtype):
        shapes = linear_shapes(config)

        def linear(name: str) -> Linear:
            return linear_of(tree[name], shapes[f"layers.0.{name}"], compute_dtype)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(tree[name]["scale"], config.rms_norm_eps)

        self.config = config
        self.input_norm = norm("input_norm")
        self.qkv = linear("qkv")
        self.q_norm = norm("q_norm") if config.qk_norm else None
        self.k_norm = norm("k_norm") if config.qk_norm else None
        self.o = linear("o")
        self.post_norm = norm("post_norm")
        self.gate_up = linear("gate_up")
        self.down = linear("down")

    def __call__(
        self,
        name: str,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        apply: Apply,
        kv: KeyValues | None = None,
    ) -> tuple[Float[Array, "b t d"], KeyValues]:
        """Runs the layer.

        Args:
          name: ``layers.{i}``, the prefix of the names that ``apply`` is called with.
          x: hidden states.
          positions: of the tokens in their sequence.
          apply: how to compute the linear layers.
          kv: this layer's part of the cache; None where the tokens are the whole sequence.

        Returns:
          ``(x, kv)``: see ``attention.attend_heads`` for kv.
        """
        x, update, kv = self.advance(name, x, None, positions, apply, kv)
        return x + update.array, kv

    def advance(
        self,
        name: str,
        x: Float[Array, "b t d"],
        update: Activations | None,
        positions: Int[Array, "b t"],
        apply: Apply,
        kv: KeyValues | None = None,
    ) -> tuple[Float[Array, "b t d"], Activations, KeyValues]:
        """Runs the layer on ``x + update``, and leaves its own last addition to the norm that follows."""
        x, normed = self.input_norm.add(x, update)
        qkv = apply(f"{name}.qkv", self.qkv, normed)
        norms = None if self.q_norm is None else (self.q_norm.scale[...], self.k_norm.scale[...])
        attended, kv = attend_heads(self.config, qkv, norms, positions, kv)
        x, normed = self.post_norm.add(x, apply(f"{name}.o", self.o, attended))
        activated = swiglu(apply(f"{name}.gate_up", self.gate_up, normed))
        return x, apply(f"{name}.down", self.down, activated), kv


class Decoder(nnx.Module):
    """A whole model: embedding, layers, final norm, output projection."""

    def __init__(self, config: ModelConfig, tree: Tree, compute_dtype):
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.embed = Embedding(tree["embed"]["embedding"])
        self.layers = nnx.List(
            [DecoderLayer(config, tree["layers"][str(i)], compute_dtype) for i in range(config.num_layers)]
        )
        self.norm = RMSNorm(tree["norm"]["scale"], config.rms_norm_eps)
        self.lm_head = OutputProjection(tree[HEAD], (config.hidden_size, config.vocab_size), compute_dtype)

    @classmethod
    def from_tree(cls, config: ModelConfig, tree: Tree, compute_dtype) -> "Decoder":
        """Builds the model around the arrays of a state tree.

        Args:
          config: of the model.
          tree: as ``abstract_tree`` describes it; a linear layer is dense if it has a ``kernel``,
            graded if it has ``planes``. Dense kernels are cast to the compute dtype.
          compute_dtype: of hidden states and matrix products, float32 or bfloat16.
        """
        return cls(config, tree, compute_dtype)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        apply: Apply,
        cache: Sequence[KeyValues] | None = None,
    ) -> tuple[Activations, list[KeyValues]]:
        """Hidden states after the final norm, and the keys and values of every layer."""
        x, update = self.embed(tokens, self.compute_dtype), None
        cache = [None] * len(self.layers) if cache is None else cache
        kept = []
        for i, (layer, kv) in enumerate(zip(self.layers, cache, strict=True)):
            x, update, kv = layer.advance(f"layers.{i}", x, update, positions, apply, kv)
            kept.append(kv)
        return self.norm.add(x, update)[1], kept

    def logits(self, x: Activations, apply: Apply) -> Float[Array, "*rows v"]:
        """float32 logits of hidden states."""
        return self.lm_head(x, apply)

    def __call__(self, tokens: Int[Array, "b t"], apply: Apply | None = None) -> Float[Array, "b t v"]:
        """float32 logits at every position of whole sequences (no cache, no padding)."""
        apply = apply or Dense()
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(self.hidden(tokens, positions, apply)[0], apply)

    def linear(self, name: str) -> Linear:
        """The linear layer of a name as in ``linear_names``."""
        if of_head(name):
            return self.lm_head.block(name)
        _, index, part = name.split(".")
        return getattr(self.layers[int(index)], part)

    @property
    def graded(self) -> bool:
        """Whether the linear layers are stored as nested codes."""
        return isinstance(self.lm_head.blocks[0], GradedLinear)

    @property
    def full_bits(self) -> int:
        """Bits of a weight of the linear layers: of the stored codes, or of the compute dtype if dense."""
        block = self.lm_head.blocks[0]
        return block.weight.max_bits if self.graded else 8 * block.kernel[...].dtype.itemsize


def checkpoint_leaves(model: Decoder) -> dict[str, Array]:
    """Returns the arrays of a model by their dotted names in a checkpoint (``layers.0.qkv.planes``)."""
    keys = {attribute: key for key, attribute in CHECKPOINT_ATTRIBUTES.items()}
    return {
        ".".join(keys.get(name, str(name)) for name in path): parameter[...]
        for path, parameter in nnx.to_flat_state(nnx.state(model))
    }


def linear_names(config: ModelConfig) -> list[str]:
    """Names of all linear layers of a graded model in the order in which they run."""
    return list(linear_shapes(config))


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """``(in_features, out_features)`` of all linear layers by name, in the order of ``linear_names``."""
    attention = config.num_heads * config.head_dim
    parts = {
        "qkv": (config.hidden_size, attention + 2 * config.num_kv_heads * config.head_dim),
        "o": (attention, config.hidden_size),
        "gate_up": (config.hidden_size, 2 * config.intermediate_size),
        "down": (config.intermediate_size, config.hidden_size),
    }
    layers = {f"layers.{i}.{part}": parts[part] for i in range(config.num_layers) for part in LAYER_LINEARS}
    return layers | block_shapes(config.hidden_size, config.vocab_size)


def abstract_tree(config: ModelConfig, max_bits: int, num_targets: int) -> dict[str, Any]:
    """The state tree of a graded model as nested dicts of ``jax.ShapeDtypeStruct``.

    Args:
      config: of the model.
      max_bits: 2, 4, 6 or 8: bits of the stored codes.
      num_targets: rows of the threshold tables.
    """

    def scale(size: int):
        return {"scale": jax.ShapeDtypeStruct((size,), jnp.bfloat16)}

    def graded(shape: tuple[int, int]):
        weight = NestedWeight.abstract(*shape, max_bits)
        return {
            "planes": weight.planes,
            "scales": weight.scales,
            "thresholds": jax.ShapeDtypeStruct((num_targets, weight.num_planes), jnp.float32),
            "gains": weight.level_gains,
            "max_activation": jax.ShapeDtypeStruct((), jnp.float32),
        }

    shapes = linear_shapes(config)
    norms = {name: scale(config.hidden_size) for name in ("input_norm", "post_norm")}
    if config.qk_norm:
        norms |= {name: scale(config.head_dim) for name in ("q_norm", "k_norm")}
    layers = {
        str(i): norms | {part: graded(shapes[f"layers.{i}.{part}"]) for part in LAYER_LINEARS}
        for i in range(config.num_layers)
    }
    head = block_shapes(config.hidden_size, config.vocab_size)
    embedding = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), jnp.bfloat16)
    return {
        "embed": {"embedding": embedding},
        "layers": layers,
        "norm": scale(config.hidden_size),
        HEAD: {
            "columns": jax.ShapeDtypeStruct((config.vocab_size,), jnp.int32),
            "blocks": {str(i): graded(shape) for i, shape in enumerate(head.values())},
        },
    }
