"""Gemma 3, text only: norms before and after each block, GELU, windows, two bases of rotation."""

import math

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.families.family import TENSORS, Family, head_norms, layer
from grinqh_jax.model.families.rope import read_ropes_by_kind
from grinqh_jax.model.layer_spec import Attention, Description, Norm
from grinqh_jax.model.logit_transform import LogitTransform
from grinqh_jax.model.rope import RopeConfig

NORM_OFFSET = 1.0
"""Checkpoints store norm scales minus this number."""


def _describe(reader: ConfigReader) -> Description:
    # transformers reads the cap of the scores and does not apply it.
    reader.refuse("use_bidirectional_attention", "attn_logit_softcapping")
    count, pattern = reader.integer("num_hidden_layers"), reader.integer("sliding_window_pattern")
    kinds = reader.layer_types([SLIDING if (i + 1) % pattern else GLOBAL for i in range(count)])
    windows = reader.windows(kinds, reader.optional_integer("sliding_window"))
    ropes = read_ropes_by_kind(reader, 1000000.0, 10000.0, "rope_local_base_freq")
    bias, activation = reader.switch("attention_bias"), reader.activation("hidden_activation")
    scalar = reader.number("query_pre_attn_scalar", 256)
    scale = None if scalar == reader.integer("head_dim") else scalar**-0.5
    return Description(
        layers=tuple(
            layer(
                Attention(
                    rope=ropes.get(kind, RopeConfig()),
                    window=window,
                    head_norms=head_norms(NORM_OFFSET),
                    score_scale=scale,
                ),
                activation,
                after=True,
                qkv_bias=bias,
                o_bias=bias,
                norm_offset=NORM_OFFSET,
            )
            for kind, window in zip(kinds, windows, strict=True)
        ),
        final_norm=Norm("norm", offset=NORM_OFFSET),
        embedding_multiplier=math.sqrt(reader.integer("hidden_size")),
        logit_transform=LogitTransform(soft_cap=reader.optional_number("final_logit_softcapping")),
    )


FAMILIES = (
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        describe=_describe,
        biases=("attention_bias",),
        tensors={
            **TENSORS,
            "layers.{i}.attention_output_norm.scale": ("model.layers.{i}.post_attention_layernorm.weight",),
            "layers.{i}.post_norm.scale": ("model.layers.{i}.pre_feedforward_layernorm.weight",),
            "layers.{i}.mlp_output_norm.scale": ("model.layers.{i}.post_feedforward_layernorm.weight",),
        },
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
        },
    ),
)
