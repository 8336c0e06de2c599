"""Says in words which options a model has, and what they rule out."""

import collections
import dataclasses
from collections.abc import Iterator

from grinqh_jax.model.attention import preparation_lacks
from grinqh_jax.model.layer_spec import (
    Attention,
    ClampedSwiGLU,
    Description,
    GatedDeltaNet,
    GatedExperts,
    GatedMLP,
    LayerSpec,
)
from pallas_kernels import router


def options(description: Description) -> list[str]:
    """Returns the options that make a model differ from Llama 3, each with the layers that have it."""
    count = len(description.layers)
    layers = collections.Counter(
        option for spec in description.layers for option in dict.fromkeys(_layer_options(spec))
    )
    lines = [
        option if members == count else f"{option} in {members} of {count} layers"
        for option, members in layers.items()
    ]
    if description.embedding_multiplier != 1:
        lines.append(f"embeddings times {description.embedding_multiplier:g}")
    if description.logit_transform.multiplier != 1:
        lines.append(f"logits times {description.logit_transform.multiplier:g}")
    if description.logit_transform.soft_cap is not None:
        lines.append(f"logits capped at {description.logit_transform.soft_cap:g}")
    return lines


def missing_kernels(description: Description) -> list[str]:
    """Returns, for options that the kernels of a decode step lack, what XLA computes instead on a GPU."""
    lines = []
    attentions = [spec.attention for spec in description.layers if spec.attention is not None]
    gaps = dict.fromkeys(preparation_lacks(attention) for attention in attentions)
    lines += [f"head norms and rotation, because of {gap}" for gap in gaps if gap is not None]
    if any(attention.output_gate for attention in attentions):
        lines.append("gates of attention")
    if description.is_recurrent:
        lines.append("gated delta nets")
    blocks = [block for spec in description.layers for block in spec.blocks]
    if any(block.norm is None or block.norm_after is not None for block in blocks):
        lines.append("residual addition and norm, because blocks normalize what they add")
    mixtures = [block.mixer for block in blocks if isinstance(block.mixer, GatedExperts)]
    mlps = [block.mixer for block in blocks if isinstance(block.mixer, GatedMLP)]
    if any(mlp.activation != "silu" for mlp in mlps):
        lines.append("the activation function of the MLP, because it is not SiLU")
    if any(mixture.activation in _WITHOUT_KERNEL for mixture in mixtures):
        lines.append("the activation function of experts, because it is not SiLU")
    for mixture in dict.fromkeys(mixtures):
        if mixture.shared:
            lines.append("routers, because there is a shared expert")
        elif (reason := router.lacks(description.num_experts, mixture.chosen)) is not None:
            lines.append(f"routers, because the kernel {reason}")
    return lines


def rotation_obstacle(description: Description) -> str | None:
    """Returns why no rotation of the residual stream is exact, in one line; None if every rotation is.

    A rotation passes through an RMS norm whose scale is folded into the projection behind it (arXiv
    2401.15024). The scale of a norm of what a block adds cannot be folded, nor can a rotation be undone
    where a projection reads the stream without a norm that holds the channel scales.
    """
    for i, spec in enumerate(description.layers):
        for block in spec.blocks:
            if block.norm is None:
                return f"layers.{i}.{block.reads.name} reads the residual stream without a norm"
            if block.norm_after is not None:
                return f"layers.{i}.{block.norm_after.name} scales the channels that are added to the stream"
    return None


_WITHOUT_KERNEL = {"gelu": "GELU", "gelu_tanh": "the tanh approximation of GELU", "relu": "ReLU"}
"""Activation functions that XLA computes, in words."""


def _layer_options(spec: LayerSpec) -> Iterator[str]:
    for block in spec.blocks:
        if isinstance(block.mixer, Attention):
            yield from _attention_options(block.mixer)
            continue
        if isinstance(block.mixer, GatedDeltaNet):
            yield "a gated delta net"
            continue
        if isinstance(block.mixer, GatedExperts):
            probabilities = "normalized" if block.mixer.normalized else "not normalized"
            yield (
                f"a mixture of experts, {block.mixer.chosen} chosen for each token, "
                f"their probabilities {probabilities}" + (", and a shared one" if block.mixer.shared else "")
            )
            if block.mixer.router_bias:
                yield "biases of routers"
        if block.mixer.activation in _WITHOUT_KERNEL:
            yield _WITHOUT_KERNEL[block.mixer.activation]
        if isinstance(block.mixer.activation, ClampedSwiGLU):
            alpha, limit = dataclasses.astuple(block.mixer.activation)
            yield f"SwiGLU clamped at {limit:g}, with alpha {alpha:g}"
    for block in spec.blocks:
        if block.norm is None:
            yield "no norms before the blocks"
        if block.norm_after is not None:
            yield "norms after the blocks"
        if block.multiplier != 1:
            yield f"residual blocks times {block.multiplier:g}"
    if biases := [projection.name for projection in spec.projections if projection.bias]:
        yield "biases of " + ", ".join(biases)


def _attention_options(attention: Attention) -> Iterator[str]:
    if attention.window is not None:
        yield f"a window of {attention.window} tokens"
    if attention.head_norms is not None:
        each = attention.head_norms[0].axis == "head"
        yield "norms of each head" if each else "norms of all heads together"
    if attention.qkv_limit is not None:
        yield f"queries, keys and values limited to {attention.qkv_limit:g}"
    if attention.score_scale is not None:
        yield f"scores times {attention.score_scale:g}"
    if attention.score_soft_cap is not None:
        yield f"scores capped at {attention.score_soft_cap:g}"
    if attention.sinks:
        yield "sinks of attention"
    if attention.output_gate:
        yield "gates of the heads"
    if attention.query_growth is not None:
        yield "queries that grow with their position"
    if attention.rope is None:
        yield "no positions"
        return
    yield f"rope {attention.rope.type} with base {attention.rope.theta:g}"
    if attention.rope.rotary_dim is not None:
        yield f"rotation of {attention.rope.rotary_dim} channels of a head"
