"""Qwen2-MoE: Qwen2 with a mixture of experts in all layers or some, and a shared expert with a gate."""

from grinqh_jax.model.config_reader import GLOBAL, ConfigReader
from grinqh_jax.model.families.family import (
    ROUTER_WITH_GATE,
    SHARED_EXPERT,
    TENSORS,
    Family,
    layer,
    read_experts,
)
from grinqh_jax.model.families.qwen3_moe import has_experts
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, Description


def _describe(reader: ConfigReader) -> Description:
    bias, activation, rope = reader.switch("qkv_bias"), reader.activation(), read_rope(reader)
    if reader.switch("use_sliding_window"):
        reader.problem("use_sliding_window True")
    mixtures = has_experts(reader)
    reader.layer_types([GLOBAL] * len(mixtures), (GLOBAL,))
    count, experts = read_experts(reader, 60, normalized=reader.switch("norm_topk_prob"), shared=True)
    return Description(
        layers=tuple(
            layer(Attention(rope=rope), activation, qkv_bias=bias, experts=experts if mixture else None)
            for mixture in mixtures
        ),
        num_experts=count,
        expert_size=reader.integer("moe_intermediate_size"),
    )


FAMILIES = (
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        describe=_describe,
        biases=("qkv_bias",),
        mixtures=True,
        tensors={**TENSORS, "layers.{i}.router.kernel": ROUTER_WITH_GATE},
        shared_expert=SHARED_EXPERT,
        defaults={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
        },
    ),
)
