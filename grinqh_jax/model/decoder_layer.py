"""The modules of a decoder: embedding, RMS norm, and a layer, which follows its ``layer_spec.LayerSpec``.

Modules hold arrays and static shapes only. The caller chooses how linear layers are computed, by a strategy
of ``apply``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from grinqh_jax.model.apply import Apply
from grinqh_jax.model.attention import attend_heads, without_gates
from grinqh_jax.model.by_token import by_token
from grinqh_jax.model.cache import KeyValues, LayerState
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.delta_net import DeltaNet
from grinqh_jax.model.experts import Router, build_experts
from grinqh_jax.model.fixed_states import RecurrentState
from grinqh_jax.model.gated_mlp import gated, gated_experts
from grinqh_jax.model.layer_spec import (
    SINKS,
    Attention,
    GatedDeltaNet,
    GatedExperts,
    GatedMLP,
    LayerSpec,
    ResidualBlock,
)
from grinqh_jax.model.linear import build_linear
from grinqh_jax.model.norm import add_norm, rms_norm
from grinqh_jax.model.parameters import axis_sizes
from grinqh_jax.model.partition import AXIS, Partition
from grinqh_jax.model.ring_cache import RingKeyValues
from pallas_kernels import Activations
from pallas_kernels.exchange import MailboxRef, UnexchangedSums
from pallas_kernels.router.grading_factor import grading_factor

Tree = Mapping[str, Any]
"""A nested dict of arrays with string keys: the state of a module."""


class Embedding(nnx.Module):
    """Token embeddings ``[vocab, hidden]``, and their factor."""

    def __init__(self, embedding: Float[Array, "v d"], multiplier: float = 1.0):
        self.embedding = nnx.Param(embedding)
        self.multiplier = multiplier

    @jax.named_scope("embed")
    def __call__(self, tokens: Int[Array, "b t"], dtype) -> Float[Array, "b t d"]:
        """Returns the embeddings of tokens, times the multiplier, in ``dtype``."""
        embedded = self.embedding[...][tokens].astype(dtype)
        return embedded if self.multiplier == 1 else embedded * self.multiplier


class RMSNorm(nnx.Module):
    """An RMS norm with a learned scale (see ``norm.rms_norm``)."""

    def __init__(self, scale: Float[Array, "d"], eps: float):
        self.scale = nnx.Param(scale)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        def normed(x):
            return rms_norm(x, self.scale[...], self.eps)

        return by_token(normed, x) if x.ndim == 3 else normed(x)  # Two axes: a text of a conversion.

    def add(
        self, x: Float[Array, "b t d"], update: Activations | UnexchangedSums | None
    ) -> tuple[Float[Array, "b t d"], Activations]:
        """Returns ``(x + update, norm of x + update)`` (see ``norm.add_norm``)."""
        return add_norm(x, update, self.scale[...], self.eps)


class DecoderLayer(nnx.Module):
    """One decoder layer; its attributes are the norms and projections that ``spec`` names.

    Args:
      config: Configuration of the model.
      spec: Structure of the layer, one of ``config.layers``.
      tree: State tree of the layer.
      compute_dtype: Dtype that dense kernels are cast to.
      partition: How a mesh cuts the model; None for one device. The layer then has the sizes of one part, and
        runs inside ``shard_map``.
    """

    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        tree: Tree,
        compute_dtype,
        partition: Partition | None = None,
    ):
        self.config = config if partition is None else partition.local
        self.spec, self.partition = spec, partition
        sizes = axis_sizes(self.config)
        for norm in self.spec.norms:
            setattr(self, norm.name, RMSNorm(tree[norm.name]["scale"], config.rms_norm_eps))
        for projection in self.spec.projections:
            shape, leaves = projection.shape(sizes), tree[projection.name]
            cut = None if partition is None else partition.input_cut(projection.inputs)
            if cut is not None:
                shape = cut.width, shape[1]
            build = (
                build_experts if projection.of_experts else partial(build_linear, compute_dtype=compute_dtype)
            )
            linear = build(leaves, shape)
            linear.input_cut = cut
            setattr(self, projection.name, linear)
        if (experts := self.spec.experts) is not None:
            setattr(self, experts.router, Router(**jax.tree.map(jnp.asarray, dict(tree[experts.router]))))
        if self.spec.attention is not None and self.spec.attention.sinks:
            setattr(self, SINKS, nnx.Param(jnp.asarray(tree[SINKS])))
        if (delta := self.spec.delta_net) is not None:
            setattr(self, delta.name, DeltaNet(**jax.tree.map(jnp.asarray, dict(tree[delta.name]))))

    def __call__(
        self,
        name: str,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        apply: Apply,
        state: LayerState | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerState]:
        """Runs the layer.

        Args:
          name: Prefix of the names that ``apply`` is called with, ``layers.{i}``.
          x: Residual stream.
          positions: Positions of the tokens in their sequence.
          apply: Strategy that computes the linear layers.
          state: State of this layer after the earlier tokens; None if the tokens are the whole sequence.

        Returns:
          ``(x, state)``: the residual stream after the layer, and the state after the tokens, as
          ``attention.attend`` or ``DeltaNet`` returns it.
        """
        x, update, state = self.advance(name, x, None, positions, apply, state)
        return x + update.array, state

    def advance(
        self,
        name: str,
        x: Float[Array, "b t d"],
        update: Activations | UnexchangedSums | None,
        positions: Int[Array, "b t"],
        apply: Apply,
        state: LayerState | None = None,
        mailbox: MailboxRef | None = None,
    ) -> tuple[Float[Array, "b t d"], Activations | UnexchangedSums, LayerState]:
        """Runs the layer on ``x + update``, and leaves the addition of its last block to the caller.

        On a GPU one kernel adds up over the devices of a mesh, adds to the stream, and computes the norm that
        follows (see ``norm.add_norm``), which for the last block belongs to the next layer.

        Returns:
          ``(x, update, state)``: the residual stream after the layer is ``x + update``.
        """
        for block in self.spec.blocks:
            x, update, state = self.run_block(name, block, x, update, positions, apply, state, mailbox)
        assert update is not None, "a layer has a residual block"
        assert state is not None, "a layer has attention or a gated delta net"
        return x, update, state

    def run_block(
        self,
        name: str,
        block: ResidualBlock,
        x: Float[Array, "b t d"],
        update: Activations | UnexchangedSums | None,
        positions: Int[Array, "b t"],
        apply: Apply,
        state: LayerState | None = None,
        mailbox: MailboxRef | None = None,
    ) -> tuple[Float[Array, "b t d"], Activations | UnexchangedSums, LayerState | None]:
        """Runs one residual block on ``x + update``, as ``advance`` runs all. Returns what that returns."""
        x, inputs = self.inputs(block, x, update)
        if isinstance(block.mixer, GatedExperts):
            written = self.mixture(name, block, block.mixer, inputs, apply)
        else:
            outputs = apply(f"{name}.{block.reads.name}", getattr(self, block.reads.name), inputs)
            mixed, state = self.mix(block, outputs, positions, state)
            mixed = self.aligned(block, mixed)
            written = apply(f"{name}.{block.writes.name}", getattr(self, block.writes.name), mixed)
        return x, self.update(block, written, mailbox), state

    def inputs(
        self, block: ResidualBlock, x: Float[Array, "b t d"], update: Activations | UnexchangedSums | None
    ) -> tuple[Float[Array, "b t d"], Activations]:
        """Returns the residual stream ``x + update`` and the inputs of ``block.reads``."""
        if block.norm is not None:
            return getattr(self, block.norm.name).add(x, update)
        x = x if update is None else x + update.array
        return x, Activations.of(x)

    def aligned(self, block: ResidualBlock, inputs: Activations) -> Activations:
        """Returns the inputs of ``block.writes`` with the padding that keeps channels in their groups."""
        if self.partition is None:
            return inputs
        cut = getattr(self, block.writes.name).input_cut
        if cut is None or not cut.shifts:
            return inputs
        x = inputs.array
        padded = jnp.zeros((*x.shape[:-1], cut.width), x.dtype)
        return Activations.of(jax.lax.dynamic_update_slice_in_dim(padded, x, cut.offset(), axis=-1))

    def update(
        self, block: ResidualBlock, written: Activations, mailbox: MailboxRef | None = None
    ) -> Activations | UnexchangedSums:
        """Returns what a block adds to the residual stream, from the outputs of ``block.writes``."""
        if self.partition is not None:
            sums = self.partition.exchanged(written, mailbox)
            if isinstance(sums, UnexchangedSums):
                if block.norm_after is None and block.multiplier == 1:
                    return sums
                sums = sums.exchanged()
            written = sums
        if block.norm_after is not None:
            written = Activations.of(getattr(self, block.norm_after.name)(written.array))
        return written if block.multiplier == 1 else written.scaled(block.multiplier)

    @jax.named_scope("experts")
    def mixture(
        self, name: str, block: ResidualBlock, mixture: GatedExperts, inputs: Activations, apply: Apply
    ) -> Activations:
        """Returns what a mixture of experts adds to the residual stream.

        Args:
          name: See ``__call__``.
          block: Block of ``spec``.
          mixture: Its mixer.
          inputs: Inputs of the router and of the experts, ``[b, t, d]``.
          apply: Strategy. It is called with a row for each chosen expert of each token, ``[b, t, c, k]``.
        """
        chosen = getattr(self, mixture.router)(inputs, mixture)
        reads = getattr(self, block.reads.name).choose(chosen.experts, grading_factor(chosen.probabilities))
        writes = getattr(self, block.writes.name).choose(chosen.experts, chosen.probabilities)
        outputs = apply(f"{name}.{block.reads.name}", reads, chosen.inputs)
        mixed = gated_experts(outputs, chosen.probabilities, mixture.activation)
        # The probabilities are factors of the inputs, so the experts' outputs are terms of one sum.
        return apply(f"{name}.{block.writes.name}", writes, mixed).summed()

    def mix(
        self,
        block: ResidualBlock,
        outputs: Activations,
        positions: Int[Array, "b t"],
        state: LayerState | None = None,
    ) -> tuple[Activations, LayerState | None]:
        """Turns the outputs of a block's first projection into the inputs of its second.

        Args:
          block: Block of ``spec`` that is no mixture of experts.
          outputs: Outputs of ``block.reads``, ``[b, t, n]``.
          positions, state: See ``__call__``.

        Returns:
          ``(inputs of block.writes, state)``: an MLP returns the state as it is.
        """
        match block.mixer:
            case Attention() as attention:
                assert not isinstance(state, RecurrentState), "attention has keys and values"
                return self._attend(attention, outputs, positions, state)
            case GatedDeltaNet(head_norm, delta):
                assert state is None or isinstance(state, RecurrentState), (
                    "a gated delta net has a recurrent state"
                )
                heads, scale = self.config.delta_heads, getattr(self, head_norm.name).scale[...]
                return getattr(self, delta)(heads, outputs, scale, self.config.rms_norm_eps, state)
            case GatedMLP(activation):
                return gated(outputs, activation), state
        raise ValueError(f"{block.reads.name} belongs to a mixture of experts, which runs as a whole")

    def _attend(
        self,
        attention: Attention,
        outputs: Activations,
        positions: Int[Array, "b t"],
        state: KeyValues | RingKeyValues | None,
    ) -> tuple[Activations, KeyValues | RingKeyValues]:
        """Computes attention and, where the description has them, the gates of its results."""
        norms, gates = attention.head_norms, None
        scales = norms and tuple(getattr(self, norm.name).scale[...] for norm in norms)
        if attention.output_gate:
            outputs, gates = without_gates(self.config, outputs)
        together = norms is not None and norms[0].axis != "head"
        across = AXIS if self.partition is not None and together else None
        sinks = getattr(self, SINKS)[...] if attention.sinks else None
        mixed, state = attend_heads(self.config, attention, outputs, scales, positions, state, across, sinks)
        if gates is not None:
            mixed = Activations.of(mixed.array * jax.nn.sigmoid(gates))
        return mixed, state
