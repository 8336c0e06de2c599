"""SmolLM3: layers without positions between layers with rotary positions."""

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.families.family import Family, layer
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, Description


def _has_rope(reader: ConfigReader) -> list[bool]:
    """Returns whether each layer has rotary positions. In ``no_rope_layers`` a layer without has 0."""
    count, flags = reader.integer("num_hidden_layers"), reader.values.get("no_rope_layers")
    if flags is None:
        interval = reader.integer("no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(count)]
    if not isinstance(flags, list) or len(flags) < count or any(flag not in (0, 1) for flag in flags):
        reader.problem(f"no_rope_layers is {flags!r:.60}, expected a list of 0 and 1 for {count} layers")
        return [True] * count
    return [bool(flag) for flag in flags[:count]]


def _describe(reader: ConfigReader) -> Description:
    has_rope = _has_rope(reader)
    window = reader.optional_integer("sliding_window")
    sliding = reader.switch("use_sliding_window") and window is not None
    kinds = [SLIDING if sliding and not rope else GLOBAL for rope in has_rope]
    windows = reader.windows(reader.layer_types(kinds), window)
    rope, activation = read_rope(reader, theta=2000000.0), reader.activation()
    bias, mlp_bias = reader.switch("attention_bias"), reader.switch("mlp_bias")
    return Description(
        layers=tuple(
            layer(
                Attention(rope=rope if rotated else None, window=window),
                activation,
                qkv_bias=bias,
                o_bias=bias,
                mlp_bias=mlp_bias,
            )
            for rotated, window in zip(has_rope, windows, strict=True)
        )
    )


FAMILIES = (
    Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        describe=_describe,
        biases=("attention_bias", "mlp_bias"),
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
    ),
)
