"""Llama 2 and 3, with biases where the configuration has them."""

from grinqh_jax.model.config_reader import ConfigReader
from grinqh_jax.model.families.family import Family, layer
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, Description


def _describe(reader: ConfigReader) -> Description:
    # The configuration class in transformers has no window. A file with one describes another model.
    reader.refuse("sliding_window")
    reader.windows(reader.layer_types(["full_attention"] * reader.integer("num_hidden_layers")), None)
    attention_bias = reader.switch("attention_bias")
    spec = layer(
        Attention(rope=read_rope(reader)),
        reader.activation(),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=reader.switch("mlp_bias"),
    )
    return Description(layers=(spec,) * reader.integer("num_hidden_layers"))


FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
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
