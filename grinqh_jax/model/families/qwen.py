"""Qwen2, Qwen2.5 and Qwen3."""

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.families.family import Family, head_norms, layer
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, Description, Norm


def _windows(reader: ConfigReader) -> list[int | None]:
    """Returns the window of each layer. A configuration may name a window and switch it off."""
    stated = reader.switch("use_sliding_window")
    window = reader.optional_integer("sliding_window") if stated else None
    count, first = reader.integer("num_hidden_layers"), reader.values["max_window_layers"]
    if window is None:
        first = count
    elif not isinstance(first, int):
        reader.problem(f"max_window_layers is {first!r}, expected an integer")
        first = 0
    kinds = [SLIDING if i >= first else GLOBAL for i in range(count)]
    return reader.windows(reader.layer_types(kinds), window)


def _layers(
    reader: ConfigReader, head_norms: tuple[Norm, Norm] | None, *, qkv_bias: bool, o_bias: bool
) -> Description:
    rope, activation = read_rope(reader), reader.activation()
    return Description(
        layers=tuple(
            layer(
                Attention(rope=rope, window=window, head_norms=head_norms),
                activation,
                qkv_bias=qkv_bias,
                o_bias=o_bias,
            )
            for window in _windows(reader)
        )
    )


def _qwen2(reader: ConfigReader) -> Description:
    return _layers(reader, None, qkv_bias=True, o_bias=False)


def _qwen3(reader: ConfigReader) -> Description:
    bias = reader.switch("attention_bias")
    return _layers(reader, head_norms(), qkv_bias=bias, o_bias=bias)


_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES = (
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        describe=_qwen2,
        biases=("attention_bias",),  # The key has no effect: the family always has these biases.
        defaults=_DEFAULTS,
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        describe=_qwen3,
        biases=("attention_bias",),
        defaults=_DEFAULTS | {"head_dim": 128},
    ),
)
