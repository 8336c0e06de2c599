"""Granite 3: multipliers of embeddings, scores, residual blocks and logits."""

from grinqh_jax.model.config_reader import ConfigReader
from grinqh_jax.model.families.family import Family, layer
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, Description
from grinqh_jax.model.logit_transform import LogitTransform


def _describe(reader: ConfigReader) -> Description:
    bias, count = reader.switch("attention_bias"), reader.integer("num_hidden_layers")
    reader.refuse("sliding_window")
    reader.windows(reader.layer_types(["full_attention"] * count), None)
    spec = layer(
        Attention(rope=read_rope(reader), score_scale=reader.number("attention_multiplier", 1.0)),
        reader.activation(),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=reader.switch("mlp_bias"),
        multiplier=reader.number("residual_multiplier", 1.0),
    )
    return Description(
        layers=(spec,) * count,
        embedding_multiplier=reader.number("embedding_multiplier", 1.0),
        logit_transform=LogitTransform(1 / reader.number("logits_scaling", 1.0)),
    )


FAMILIES = (
    Family(
        model_type="granite",
        architecture="GraniteForCausalLM",
        describe=_describe,
        biases=("attention_bias", "mlp_bias"),
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
)
