"""Qwen3.5 and Qwen3.6, text only: gated delta nets between layers of attention whose heads have gates.

The mixtures of Qwen3.5-MoE have a shared expert. It is stored as more experts (``GatedExperts.shared``).
"""

import dataclasses
from collections.abc import Sequence

from grinqh_jax.model.config_reader import GLOBAL, LINEAR, ConfigReader
from grinqh_jax.model.families.family import (
    ROUTER_WITH_GATE,
    SHARED_EXPERT,
    TENSORS,
    Family,
    head_norms,
    layer,
    read_experts,
)
from grinqh_jax.model.families.rope import ROPE_TYPES, read_rope
from grinqh_jax.model.layer_spec import Attention, DeltaHeads, Description, GatedDeltaNet, GatedExperts, Norm

NORM_OFFSET = 1.0
"""Checkpoints store norm scales minus this number, except those of gated delta nets."""


def _delta_heads(reader: ConfigReader) -> DeltaHeads:
    heads = DeltaHeads(
        key_heads=reader.integer("linear_num_key_heads"),
        value_heads=reader.integer("linear_num_value_heads"),
        key_dim=reader.integer("linear_key_head_dim"),
        value_dim=reader.integer("linear_value_head_dim"),
        convolution_width=reader.integer("linear_conv_kernel_dim"),
    )
    if heads.value_heads % heads.key_heads:
        reader.problem(
            f"linear_num_value_heads {heads.value_heads} is not a multiple of linear_num_key_heads "
            f"{heads.key_heads}"
        )
    return heads


def _dense(reader: ConfigReader) -> Description:
    return describe(reader, [None] * reader.integer("num_hidden_layers"))


def _mixtures(reader: ConfigReader) -> Description:
    count, experts = read_experts(reader, 256, normalized=True, shared=True)
    description = describe(reader, [experts] * reader.integer("num_hidden_layers"))
    return dataclasses.replace(
        description, num_experts=count, expert_size=reader.integer("moe_intermediate_size")
    )


def describe(reader: ConfigReader, mixtures: Sequence[GatedExperts | None]) -> Description:
    """Returns the description of a model with the given mixture of experts, or None, in each layer."""
    count, interval = reader.integer("num_hidden_layers"), reader.integer("full_attention_interval")
    kinds = reader.layer_types(
        [LINEAR if (i + 1) % interval else GLOBAL for i in range(count)], (GLOBAL, LINEAR)
    )
    if GLOBAL not in kinds:
        reader.problem(f"layer_types without {GLOBAL}: the context of a cache follows from its attention")
    # Images have positions of three kinds. For text they are equal, so that ``mrope_section`` has no effect.
    types = {name: kind for name, kind in ROPE_TYPES.items() if kind != "longrope"}
    attention = Attention(
        rope=read_rope(reader, types=types, partial=True),
        head_norms=head_norms(NORM_OFFSET),
        output_gate=True,
    )
    delta_net = GatedDeltaNet(Norm("delta_norm", "delta_head"))
    bias, activation = reader.switch("attention_bias"), reader.activation()
    if activation != "silu":
        reader.problem(f"hidden_act {reader.values['hidden_act']!r} (supported in this family: silu)")
    return Description(
        layers=tuple(
            layer(delta_net, activation, norm_offset=NORM_OFFSET, experts=experts)
            if kind == LINEAR
            else layer(
                attention, activation, qkv_bias=bias, o_bias=bias, norm_offset=NORM_OFFSET, experts=experts
            )
            for kind, experts in zip(kinds, mixtures, strict=True)
        ),
        final_norm=Norm("norm", offset=NORM_OFFSET),
        delta_heads=_delta_heads(reader) if LINEAR in kinds else None,
    )


DELTA_TENSORS = {
    **TENSORS,
    "layers.{i}.delta_in.kernel": (
        "model.layers.{i}.linear_attn.in_proj_qkv.weight",
        "model.layers.{i}.linear_attn.in_proj_z.weight",
        "model.layers.{i}.linear_attn.in_proj_b.weight",
        "model.layers.{i}.linear_attn.in_proj_a.weight",
    ),
    "layers.{i}.delta.convolution": ("model.layers.{i}.linear_attn.conv1d.weight",),
    "layers.{i}.delta.log_decay": ("model.layers.{i}.linear_attn.A_log",),
    "layers.{i}.delta.step_bias": ("model.layers.{i}.linear_attn.dt_bias",),
    "layers.{i}.delta_norm.scale": ("model.layers.{i}.linear_attn.norm.weight",),
    "layers.{i}.delta_out.kernel": ("model.layers.{i}.linear_attn.out_proj.weight",),
}
"""Names of the tensors of models with gated delta nets."""

DELTA_DEFAULTS = {
    "vocab_size": 248320,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
"""Values of keys that a configuration may lack, in all families with gated delta nets."""

MULTI_TOKEN_HEAD = {"the multi-token prediction head": r"mtp\..*"}

_LEFT_OUT = MULTI_TOKEN_HEAD | {"the vision tower": r"model\.visual\..*"}

FAMILIES = (
    Family(
        model_type="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        describe=_dense,
        biases=("attention_bias",),
        tensors=DELTA_TENSORS,
        defaults=DELTA_DEFAULTS | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32},
        left_out=_LEFT_OUT,
    ),
    Family(
        model_type="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        describe=_mixtures,
        biases=("attention_bias",),
        mixtures=True,
        tensors=DELTA_TENSORS | {"layers.{i}.router.kernel": ROUTER_WITH_GATE},
        shared_expert=SHARED_EXPERT,
        defaults=DELTA_DEFAULTS
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "intermediate_size": 512,  # No layer has an MLP without experts.
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts_per_tok": 8,
        },
        left_out=_LEFT_OUT,
    ),
)
