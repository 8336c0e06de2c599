"""Qwen3-Next: the layers of Qwen3.5-MoE, in all layers or some, and dense layers between.

Its checkpoints store the projections of gated delta nets key head by key head.
"""

import dataclasses

from grinqh_jax.model.config_reader import ConfigReader
from grinqh_jax.model.families.family import ROUTER_WITH_GATE, SHARED_EXPERT, Family, read_experts
from grinqh_jax.model.families.qwen3_5 import DELTA_DEFAULTS, DELTA_TENSORS, MULTI_TOKEN_HEAD, describe
from grinqh_jax.model.families.qwen3_moe import has_experts
from grinqh_jax.model.layer_spec import Description


def _describe(reader: ConfigReader) -> Description:
    count, experts = read_experts(reader, 512, normalized=reader.switch("norm_topk_prob"), shared=True)
    description = describe(reader, [experts if mixture else None for mixture in has_experts(reader)])
    return dataclasses.replace(
        description, num_experts=count, expert_size=reader.integer("moe_intermediate_size")
    )


FAMILIES = (
    Family(
        model_type="qwen3_next",
        architecture="Qwen3NextForCausalLM",
        describe=_describe,
        biases=("attention_bias",),
        mixtures=True,
        tensors=DELTA_TENSORS | {"layers.{i}.router.kernel": ROUTER_WITH_GATE},
        shared_expert=SHARED_EXPERT,
        delta_nets_by_head=(
            "model.layers.{i}.linear_attn.in_proj_qkvz.weight",
            "model.layers.{i}.linear_attn.in_proj_ba.weight",
        ),
        defaults=DELTA_DEFAULTS
        | {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "intermediate_size": 5632,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
        },
        left_out=MULTI_TOKEN_HEAD,
    ),
)
