"""gpt-oss: mixtures with biases and a clamped SwiGLU, sinks of attention, windows in every other layer."""

import dataclasses

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.families.family import TENSORS, ExpertLayout, Family, layer, read_experts
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, ClampedSwiGLU, Description


def _describe(reader: ConfigReader) -> Description:
    count, bias = reader.integer("num_hidden_layers"), reader.switch("attention_bias")
    kinds = reader.layer_types([GLOBAL if i % 2 else SLIDING for i in range(count)])
    windows = reader.windows(kinds, reader.optional_integer("sliding_window"))
    if (activation := reader.activation()) != "silu":
        reader.problem(f"hidden_act {reader.values['hidden_act']!r} (supported in this family: silu)")
    rope = read_rope(reader)
    num_experts, experts = read_experts(reader, 128, normalized=True)
    clamped = ClampedSwiGLU(
        alpha=reader.number_not_null("swiglu_alpha", 1.702), limit=reader.number_not_null("swiglu_limit", 7.0)
    )
    experts = dataclasses.replace(experts, router_bias=True, activation=clamped)
    return Description(
        layers=tuple(
            layer(
                Attention(rope=rope, window=window, sinks=True),
                activation,
                qkv_bias=bias,
                o_bias=bias,
                mlp_bias=True,
                experts=experts,
            )
            for window in windows
        ),
        num_experts=num_experts,
        expert_size=reader.integer("intermediate_size"),
    )


FAMILIES = (
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        describe=_describe,
        biases=("attention_bias",),
        mixtures=True,
        tensors={**TENSORS, "layers.{i}.router.kernel": ("model.layers.{i}.mlp.router.weight",)},
        experts_together=ExpertLayout(transposed=True, interleaved=True),
        quant_method="mxfp4",
        defaults={
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "attention_bias": True,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
)
