"""Mistral, Mixtral, Ministral and Ministral 3."""

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.families.family import TENSORS, Family, layer, read_experts
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, Description, QueryGrowth


def _layers(
    reader: ConfigReader, windows: list[int | None], growth: QueryGrowth | None = None
) -> Description:
    rope, activation = read_rope(reader), reader.activation()
    return Description(
        layers=tuple(
            layer(Attention(rope=rope, window=window, query_growth=growth), activation) for window in windows
        )
    )


def _kinds(reader: ConfigReader) -> list[str]:
    """Returns the kind of each layer that follows from ``sliding_window`` alone."""
    kind = GLOBAL if reader.values.get("sliding_window") is None else SLIDING
    return [kind] * reader.integer("num_hidden_layers")


def _same_window(reader: ConfigReader) -> list[int | None]:
    """Returns the window of each layer, which is the same for all: transformers ignores ``layer_types``."""
    kinds = _kinds(reader)
    if reader.layer_types(kinds) != kinds:
        reader.problem("layer_types of another kind than sliding_window says (model_type ministral has them)")
    return [reader.optional_integer("sliding_window")] * len(kinds)


def _mistral(reader: ConfigReader) -> Description:
    return _layers(reader, _same_window(reader))


def _mixtral(reader: ConfigReader) -> Description:
    count, experts = read_experts(reader, 8, normalized=True)
    rope, activation = read_rope(reader, theta=1000000.0), reader.activation()
    return Description(
        layers=tuple(
            layer(Attention(rope=rope, window=window), activation, experts=experts)
            for window in _same_window(reader)
        ),
        num_experts=count,
        expert_size=reader.integer("intermediate_size"),
    )


def _ministral(reader: ConfigReader) -> Description:
    kinds = reader.layer_types(_kinds(reader))
    return _layers(reader, reader.windows(kinds, reader.optional_integer("sliding_window")))


def _ministral3(reader: ConfigReader) -> Description:
    rope = reader.section("rope_scaling")
    rope = rope if rope.values else reader.section("rope_parameters")
    rate = rope.values.get("llama_4_scaling_beta")
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        reader.problem(f"llama_4_scaling_beta of rope_parameters is {rate!r}, expected a number")
        rate = 0.0
    config = read_rope(reader)
    if config.type in ("llama3", "yarn"):
        length = config.original_max_position_embeddings
    else:
        length = rope.integer("original_max_position_embeddings")
    return _layers(reader, _same_window(reader), QueryGrowth(float(rate), length))


_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_DEFAULTS = _SIZES | {
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

FAMILIES = (
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        describe=_mistral,
        defaults=_DEFAULTS,
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        describe=_mixtral,
        mixtures=True,
        tensors={
            **TENSORS,
            "layers.{i}.router.kernel": ("model.layers.{i}.block_sparse_moe.gate.weight",),
            "layers.{i}.experts_gate_up.kernel": (
                "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
                "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
            ),
            "layers.{i}.experts_down.kernel": ("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",),
        },
        defaults=_SIZES
        | {
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2,
        },
    ),
    Family(
        model_type="ministral",
        architecture="MinistralForCausalLM",
        describe=_ministral,
        defaults=_DEFAULTS,
    ),
    Family(
        model_type="ministral3",
        architecture="Ministral3ForCausalLM",
        describe=_ministral3,
        defaults=_SIZES
        | {
            "vocab_size": 131072,
            "num_hidden_layers": 34,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _ROPE,
        },
    ),
)
