"""OLMo 2 and 3: norms after attention and MLP instead of before, one norm for all query or all key heads.

OLMoE has mixtures of experts, and its norms are before.
"""

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.families.family import TENSORS, Family, layer, read_experts
from grinqh_jax.model.families.rope import read_rope, read_ropes_by_kind
from grinqh_jax.model.layer_spec import Attention, Description, LayerSpec, Norm
from grinqh_jax.model.rope import RopeConfig

HEAD_NORMS = Norm("q_norm", "query"), Norm("k_norm", "key_value")

OLMO3_THETA = 500000.0


def _layer(reader: ConfigReader, rope: RopeConfig, window: int | None) -> LayerSpec:
    bias = reader.switch("attention_bias")
    return layer(
        Attention(rope=rope, window=window, head_norms=HEAD_NORMS),
        reader.activation(),
        before=False,
        after=True,
        qkv_bias=bias,
        o_bias=bias,
    )


def _olmo2(reader: ConfigReader) -> Description:
    count = reader.integer("num_hidden_layers")
    reader.refuse("sliding_window")
    reader.windows(reader.layer_types([GLOBAL] * count), None)
    return Description(layers=(_layer(reader, read_rope(reader), None),) * count)


def _olmo3(reader: ConfigReader) -> Description:
    count = reader.integer("num_hidden_layers")
    kinds = reader.layer_types([SLIDING if (i + 1) % 4 else GLOBAL for i in range(count)])
    windows = reader.windows(kinds, reader.optional_integer("sliding_window"))
    ropes = read_ropes_by_kind(reader, OLMO3_THETA, OLMO3_THETA)
    return Description(
        layers=tuple(
            _layer(reader, ropes.get(kind, RopeConfig()), window)
            for kind, window in zip(kinds, windows, strict=True)
        )
    )


def _olmoe(reader: ConfigReader) -> Description:
    reader.refuse("sliding_window")
    layers = reader.layer_types([GLOBAL] * reader.integer("num_hidden_layers"))
    reader.windows(layers, None)
    count, experts = read_experts(reader, 64, normalized=reader.switch("norm_topk_prob"))
    bias = reader.switch("attention_bias")
    spec = layer(
        Attention(
            rope=read_rope(reader), head_norms=HEAD_NORMS, qkv_limit=reader.optional_number("clip_qkv")
        ),
        reader.activation(),
        qkv_bias=bias,
        o_bias=bias,
        experts=experts,
    )
    return Description(
        layers=(spec,) * len(layers),
        num_experts=count,
        expert_size=reader.integer("intermediate_size"),
    )


_TENSORS = {
    **TENSORS,
    "layers.{i}.attention_output_norm.scale": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.mlp_output_norm.scale": ("model.layers.{i}.post_feedforward_layernorm.weight",),
}
_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}

FAMILIES = (
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        describe=_olmo2,
        biases=("attention_bias",),
        tensors=_TENSORS,
        defaults=_DEFAULTS,
    ),
    Family(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        describe=_olmo3,
        biases=("attention_bias",),
        tensors=_TENSORS,
        defaults=_DEFAULTS | {"sliding_window": 4096},
    ),
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        describe=_olmoe,
        biases=("attention_bias",),
        mixtures=True,
        defaults={
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 8,
        },
    ),
)
