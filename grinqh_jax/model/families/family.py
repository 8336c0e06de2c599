"""A family: its name, the defaults of its configuration, its tensors, and the description of its layers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from grinqh_jax.model.config_reader import ConfigReader
from grinqh_jax.model.layer_spec import (
    Activation,
    Attention,
    Description,
    GatedDeltaNet,
    GatedExperts,
    GatedMLP,
    LayerSpec,
    Norm,
    Projection,
    ResidualBlock,
)

INPUT_NORM, POST_NORM = "input_norm", "post_norm"
"""Names of the norms through which attention and the MLP read the residual stream."""

ATTENTION_OUTPUT_NORM, MLP_OUTPUT_NORM = "attention_output_norm", "mlp_output_norm"
"""Names of the norms that attention and the MLP apply to their additions to the residual stream."""

TENSORS: Mapping[str, tuple[str, ...]] = {
    "embed.embedding": ("model.embed_tokens.weight",),
    "layers.{i}.input_norm.scale": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.qkv.kernel": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.q_norm.scale": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.k_norm.scale": ("model.layers.{i}.self_attn.k_norm.weight",),
    "layers.{i}.sinks": ("model.layers.{i}.self_attn.sinks",),
    "layers.{i}.o.kernel": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.post_norm.scale": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.gate_up.kernel": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.down.kernel": ("model.layers.{i}.mlp.down_proj.weight",),
    "layers.{i}.router.kernel": ("model.layers.{i}.mlp.gate.weight",),
    "layers.{i}.experts_gate_up.kernel": (
        "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
        "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    ),
    "layers.{i}.experts_down.kernel": ("model.layers.{i}.mlp.experts.{e}.down_proj.weight",),
    "norm.scale": ("model.norm.weight",),
    "lm_head.kernel": ("lm_head.weight",),
}
"""Names of the Hugging Face tensors that each parameter is made of, in most families.

A kernel has one name for each axis of its outputs, in their order, or one name if the checkpoint stores them
fused. ``i`` is the index of a layer, ``e`` that of an expert. Hugging Face stores a kernel as ``[outputs,
inputs]``. The tensors of a bias have the names of the kernel's tensors, with ``bias`` instead of
``weight``."""

SHARED_EXPERT: Mapping[str, tuple[str, ...]] = {
    "experts_gate_up.kernel": (
        "model.layers.{i}.mlp.shared_expert.gate_proj.weight",
        "model.layers.{i}.mlp.shared_expert.up_proj.weight",
    ),
    "experts_down.kernel": ("model.layers.{i}.mlp.shared_expert.down_proj.weight",),
}
"""Names of the tensors of a shared expert, by parameter in a layer."""

ROUTER_WITH_GATE = (
    *TENSORS["layers.{i}.router.kernel"],
    "model.layers.{i}.mlp.shared_expert_gate.weight",
)
"""Names of the tensors of a router that has a gate of the shared expert."""


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """How one tensor holds the same projections of all experts of a layer.

    Attributes:
      transposed: Whether it is ``[experts, inputs, outputs]`` and not ``[experts, outputs, inputs]``.
      interleaved: Whether the outputs of gate and up alternate; otherwise those of up follow those of gate.
    """

    transposed: bool = False
    interleaved: bool = False


NUM_EXPERTS = ("num_experts", "num_local_experts")
"""Spellings of the number of experts."""

EMBEDDING, LM_HEAD = TENSORS["embed.embedding"][0], TENSORS["lm_head.kernel"][0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A model family.

    Attributes:
      model_type: ``model_type`` of its configurations.
      architecture: Entry of ``architectures`` in its configurations.
      describe: Returns the description of a model. It reports options that are not supported as problems of
        the reader.
      defaults: Values of keys that a configuration may lack, from the configuration class in transformers.
      tensors: Names of the tensors of each parameter (``TENSORS``).
      biases: Configuration keys of biases that the family implements; the others are refused.
      mixtures: Whether the family implements mixtures of experts; the others refuse them.
      shared_expert: Names of the tensors of a shared expert, by parameter in a layer; empty without one.
      experts_together: Layout of the tensors that hold all experts of a layer. None if checkpoints usually
        have tensors for each expert; one for all is then read in the default layout.
      delta_nets_by_head: Names of the two tensors that hold the projections of ``delta_in`` key head by key
        head, if checkpoints have them (``hf.stored_together``).
      quant_method: ``quant_method`` of quantized checkpoints that are read (``hf.mxfp4``), or None.
      left_out: Parts of a checkpoint that are not read, in words, each with a pattern of its tensors' names.
    """

    model_type: str
    architecture: str
    describe: Callable[[ConfigReader], Description]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: TENSORS)
    biases: tuple[str, ...] = ()
    mixtures: bool = False
    shared_expert: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    experts_together: ExpertLayout | None = None
    delta_nets_by_head: tuple[str, str] | None = None
    quant_method: str | None = None
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)


def layer(
    attention: Attention | GatedDeltaNet,
    activation: Activation | str,
    *,
    before: bool = True,
    after: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    multiplier: float = 1.0,
    norm_offset: float = 0.0,
    experts: GatedExperts | None = None,
) -> LayerSpec:
    """Returns a layer of attention or a gated delta net, and a gated MLP or a mixture of experts.

    Args:
      attention: Attention or gated delta net of the layer. A gated delta net has no biases.
      activation: Activation function of the MLP.
      before: Whether both blocks read the residual stream through norms.
      after: Whether both blocks normalize what they add to the stream.
      qkv_bias, o_bias, mlp_bias: Whether ``qkv``, ``o``, and both projections of MLP or experts have biases.
      multiplier: Factor of what both blocks add to the stream.
      norm_offset: See ``Norm``.
      experts: Mixture of experts in place of the MLP.
    """

    def norm(name: str, exists: bool) -> Norm | None:
        return Norm(name, offset=norm_offset) if exists else None

    if experts is None:
        reads = Projection("gate_up", "hidden", ("intermediate", "intermediate"), mlp_bias)
        writes = Projection("down", "intermediate", ("hidden",), mlp_bias)
    else:
        reads = Projection("experts_gate_up", "hidden", ("expert", "expert"), mlp_bias, of_experts=True)
        writes = Projection("experts_down", "expert", ("hidden",), mlp_bias, of_experts=True)
    if isinstance(attention, GatedDeltaNet):
        outputs = "delta_qkv", "delta_value", "delta_heads", "delta_heads"
        first = Projection("delta_in", "hidden", outputs), Projection("delta_out", "delta_value", ("hidden",))
    else:
        query = "gated_query" if attention.output_gate else "query"
        first = (
            Projection("qkv", "hidden", (query, "key_value", "key_value"), qkv_bias),
            Projection("o", "query", ("hidden",), o_bias),
        )
    return LayerSpec(
        (
            ResidualBlock(
                norm=norm(INPUT_NORM, before),
                reads=first[0],
                mixer=attention,
                writes=first[1],
                norm_after=norm(ATTENTION_OUTPUT_NORM, after),
                multiplier=multiplier,
            ),
            ResidualBlock(
                norm=norm(POST_NORM, before),
                reads=reads,
                mixer=GatedMLP(activation) if experts is None else experts,  # type: ignore[arg-type]
                writes=writes,
                norm_after=norm(MLP_OUTPUT_NORM, after),
                multiplier=multiplier,
            ),
        )
    )


def head_norms(offset: float = 0.0) -> tuple[Norm, Norm]:
    """Returns norms of every query head and of every key head."""
    return Norm("q_norm", "head", offset), Norm("k_norm", "head", offset)


def read_experts(
    reader: ConfigReader, default: int, *, normalized: bool, shared: bool = False
) -> tuple[int, GatedExperts]:
    """Reads the number of experts, and the mixture that chooses ``num_experts_per_tok`` of them.

    Args:
      reader: Configuration.
      default: Number of experts if the configuration has none of ``NUM_EXPERTS``.
      normalized: See ``GatedExperts``.
      shared: Whether there is a shared expert, which the result counts as experts of the usual width.
    """
    stated = {reader.integer(key) for key in NUM_EXPERTS if reader.values.get(key) is not None}
    if not set(NUM_EXPERTS) & reader.values.keys():
        stated = {default}
    if len(stated) != 1:
        values = ", ".join(f"{key} {reader.values.get(key)}" for key in NUM_EXPERTS)
        reader.problem(f"{values}: expected one number of experts")
        return 1, GatedExperts(chosen=1, normalized=normalized)
    count, chosen = stated.pop(), reader.integer("num_experts_per_tok")
    if chosen > count:
        reader.problem(f"num_experts_per_tok {chosen} exceeds the {count} experts")
    width = reader.integer("shared_expert_intermediate_size") if shared else 0
    parts = math.ceil(width / reader.integer("moe_intermediate_size")) if shared else 0
    return count + parts, GatedExperts(
        chosen=chosen,
        normalized=normalized,
        shared=parts,
        shared_width=width,
        activation=reader.activation(),  # type: ignore[arg-type]
    )
