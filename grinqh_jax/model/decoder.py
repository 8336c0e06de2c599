"""The decoder-only transformer of all families, as Flax NNX modules.

Modules hold arrays and static shapes only, so a ``Decoder`` is a pytree and can be an argument of a jitted
function. The caller chooses how linear layers are computed, by a strategy of ``apply``. ``decoder_layer`` has
the modules of a layer, ``layer_spec`` describes its structure.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int

from grinqh_jax.model.apply import Apply, Dense, in_head
from grinqh_jax.model.cache import LayerState
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder_layer import DecoderLayer, Embedding, RMSNorm, Tree
from grinqh_jax.model.experts import DenseExperts, GradedExperts
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.linear import CHECKPOINT_ATTRIBUTES, GradedLinear, Linear
from grinqh_jax.model.output_projection import OutputProjection, block_shapes
from grinqh_jax.model.parameters import (
    EMBEDDING,
    axis_sizes,
    projections,
    router_projections,
    stored_dtypes,
    vectors,
)
from grinqh_jax.model.partition import Partition
from pallas_kernels import Activations, NestedWeight
from pallas_kernels.exchange import MailboxRef, UnexchangedSums
from pallas_kernels.expert_weights import NestedExperts


class Decoder(nnx.Module):
    """A whole model: embedding, layers, final norm, output projection.

    Attributes:
      config: Configuration of the whole model, also on a mesh.
      compute_dtype: Dtype of hidden states and matrix products.
      partition: How a mesh cuts the model; None for one device. A model on a mesh has the arrays of all parts
        (``sharding.cutting``) and the sizes of one, so it runs only inside ``sharding.program.on_mesh``.
    """

    def __init__(self, config: ModelConfig, tree: Tree, compute_dtype, partition: Partition | None = None):
        self.config, self.partition = config, partition
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.embed = Embedding(tree["embed"]["embedding"], config.embedding_multiplier)
        self.layers = nnx.List(
            [
                DecoderLayer(config, spec, tree["layers"][str(i)], compute_dtype, partition)
                for i, spec in enumerate(config.layers)
            ]
        )
        self.norm = RMSNorm(tree[config.final_norm.name]["scale"], config.rms_norm_eps)
        shape = config.hidden_size, config.vocab_size
        self.lm_head = OutputProjection(tree[HEAD], shape, compute_dtype, config.logit_transform, partition)

    @classmethod
    def from_tree(
        cls, config: ModelConfig, tree: Tree, compute_dtype, partition: Partition | None = None
    ) -> "Decoder":
        """Builds the model around the arrays of a state tree.

        Args:
          config: Configuration of the model.
          tree: State tree as in ``abstract_tree``. A linear layer is dense if it has a ``kernel``, graded if
            it has ``planes``. Dense kernels, except those of experts, are cast to the compute dtype.
          compute_dtype: Dtype of hidden states and matrix products, float32 or bfloat16.
          partition: How a mesh cuts the model, if ``tree`` has cut arrays.
        """
        return cls(config, tree, compute_dtype, partition)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        apply: Apply,
        cache: Sequence[LayerState] | None = None,
        mailbox: MailboxRef | None = None,
    ) -> tuple[Activations, list[LayerState]]:
        """Runs embedding, layers and final norm.

        Args:
          tokens: int32 tokens.
          positions: Positions of the tokens in their sequence.
          apply: Strategy that computes the linear layers.
          cache: State of each layer after the earlier tokens (``KVCache.layers``); None if the tokens are the
            whole sequence.
          mailbox: Memory for the exchanges of a mesh; None to exchange by XLA's collectives.

        Returns:
          Hidden states ``[b, t, d]`` after the final norm, and the state of each layer after the tokens.
        """
        x: Float[Array, "b t d"] = self.embed(tokens, self.compute_dtype)
        update: Activations | UnexchangedSums | None = None
        earlier: Sequence[LayerState | None] = [None] * len(self.layers) if cache is None else cache
        updated = []
        for i, (layer, state) in enumerate(zip(self.layers, earlier, strict=True)):
            x, update, state = layer.advance(f"layers.{i}", x, update, positions, apply, state, mailbox)
            updated.append(state)
        return self.norm.add(x, update)[1], updated

    def logits(self, x: Activations, apply: Apply) -> Float[Array, "*rows v"]:
        """Returns float32 logits of hidden states ``[*rows, d]``."""
        return self.lm_head(x, apply)

    def __call__(self, tokens: Int[Array, "b t"], apply: Apply | None = None) -> Float[Array, "b t v"]:
        """Returns float32 logits at every position of whole sequences, without cache or padding.

        ``apply`` is ``Dense`` by default.
        """
        apply = apply or Dense()
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(self.hidden(tokens, positions, apply)[0], apply)

    def linear(self, name: str) -> Linear | DenseExperts | GradedExperts:
        """Returns the linear layer of one of ``linear_names``."""
        if in_head(name):
            return self.lm_head.block(name)
        _, index, projection = name.split(".")
        return getattr(self.layers[int(index)], projection)

    def graded_linear(self, name: str) -> GradedLinear | GradedExperts:
        """Returns the graded linear layer of one of ``linear_names``.

        Raises:
          ValueError: The layer is dense.
        """
        linear = self.linear(name)
        if not isinstance(linear, GradedLinear | GradedExperts):
            raise ValueError(f"{name} is dense; load a GRINQH checkpoint")
        return linear

    @property
    def part_config(self) -> ModelConfig:
        """Configuration of the part of one device: that of the whole model, if there is no mesh."""
        return self.config if self.partition is None else self.partition.local

    @property
    def cache_config(self) -> ModelConfig:
        """Configuration for which a KV cache has the heads of all devices, shared ones several times."""
        if self.partition is None:
            return self.config
        local, devices = self.partition.local, self.partition.devices
        delta = local.delta_heads
        if delta is not None:
            delta = dataclasses.replace(
                delta, key_heads=delta.key_heads * devices, value_heads=delta.value_heads * devices
            )
        return dataclasses.replace(self.config, num_kv_heads=local.num_kv_heads * devices, delta_heads=delta)

    @property
    def graded(self) -> bool:
        """Whether the linear layers are stored as nested codes."""
        return isinstance(self.lm_head.blocks[0], GradedLinear)

    @property
    def full_bits(self) -> int:
        """Number of bits of a weight at full precision: of its code, or of the dtype of a dense kernel."""
        block = self.lm_head.blocks[0]
        if isinstance(block, GradedLinear):
            return block.weight.max_bits
        return 8 * block.kernel[...].dtype.itemsize


def checkpoint_leaves(model: Decoder) -> dict[str, Array]:
    """Returns the arrays of a model by their dotted names in a checkpoint (``layers.0.qkv.planes``)."""
    keys = {attribute: key for key, attribute in CHECKPOINT_ATTRIBUTES.items()}
    return {
        ".".join(keys.get(str(name), str(name)) for name in path): parameter[...]
        for path, parameter in nnx.to_flat_state(nnx.state(model))
    }


def linear_names(config: ModelConfig) -> list[str]:
    """Returns the names of all linear layers of a graded model in the order in which they run."""
    return list(linear_shapes(config))


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns ``(in_features, out_features)`` of all linear layers by name, in running order.

    A linear layer of experts has this shape for each expert.
    """
    sizes = axis_sizes(config)
    shapes = {name: projection.shape(sizes) for name, projection in projections(config).items()}
    return shapes | block_shapes(config.hidden_size, config.vocab_size)


def abstract_tree(config: ModelConfig, max_bits: int, num_targets: int) -> dict[str, Any]:
    """Returns the state tree of a graded model as nested dicts of ``jax.ShapeDtypeStruct``.

    Args:
      config: Configuration of the model.
      max_bits: Bits of the stored codes: 2, 4, 6 or 8.
      num_targets: Number of rows of the threshold tables.
    """
    sizes = axis_sizes(config)

    def graded(shape: tuple[int, int], of_experts: bool) -> dict[str, Any]:
        weight: NestedWeight | NestedExperts
        if of_experts:
            weight = NestedExperts.abstract(config.num_experts, *shape, max_bits)
        else:
            weight = NestedWeight.abstract(*shape, max_bits)
        return {
            "planes": weight.planes,
            "scales": weight.scales,
            "thresholds": jax.ShapeDtypeStruct((num_targets, weight.num_planes), jnp.float32),
            "gains": weight.level_gains,
            "max_activation": jax.ShapeDtypeStruct((), jnp.float32),
        }

    leaves: dict[str, Any] = {
        EMBEDDING: jax.ShapeDtypeStruct((sizes["vocab"], sizes["hidden"]), jnp.bfloat16)
    }
    experts = {name for name, projection in projections(config).items() if projection.of_experts}
    for name, shape in linear_shapes(config).items():
        leaves |= {f"{name}.{leaf}": value for leaf, value in graded(shape, name in experts).items()}
    others: dict[str, tuple[int, ...]] = {
        f"{name}.kernel": router.shape(sizes) for name, router in router_projections(config).items()
    }
    dtypes = stored_dtypes(config)
    for name, other in (others | vectors(config)).items():
        leaves[name] = jax.ShapeDtypeStruct(other, dtypes[name])
    leaves[f"{HEAD}.columns"] = jax.ShapeDtypeStruct((sizes["vocab"],), jnp.int32)
    return unflatten_dict(leaves, sep=".")
