"""Qwen2-MoE: Qwen2 with a mixture of experts in all layers or some, and a shared expert with a gate."""

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
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
    mixtures, sliding = has_experts(reader), reader.switch("use_sliding_window")
    last = reader.integer("max_window_layers")
    kinds = [SLIDING if sliding and i % 2 == 0 and i < last else GLOBAL for i in range(len(mixtures))]
    window = reader.optional_integer("sliding_window") if sliding else None
    windows = reader.windows(reader.layer_types(kinds), window)
    count, experts = read_experts(reader, 60, normalized=reader.switch("norm_topk_prob"), shared=True)
    return Description(
        layers=tuple(
            layer(
                Attention(rope=rope, window=window),
                activation,
                qkv_bias=bias,
                experts=experts if mixture else None,
            )
            for mixture, window in zip(mixtures, windows, strict=True)
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
            "sliding_window": 4096,
            "max_window_layers": 28,
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
        },
    ),
)
