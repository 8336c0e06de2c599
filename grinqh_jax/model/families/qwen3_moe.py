"""Qwen3-MoE: Qwen3 with a mixture of experts in all layers or some, and dense layers between."""

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.families.family import Family, head_norms, layer, read_experts
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, Description


def has_experts(reader: ConfigReader) -> list[bool]:
    """Returns whether each layer is a mixture: every ``decoder_sparse_step``-th one not in a list."""
    count, step = reader.integer("num_hidden_layers"), reader.integer("decoder_sparse_step", 1)
    dense = reader.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        reader.problem(f"mlp_only_layers is {dense!r:.60}, expected a list of layers")
        dense = []
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]


def _describe(reader: ConfigReader) -> Description:
    bias, activation, rope = reader.switch("attention_bias"), reader.activation(), read_rope(reader)
    # transformers gives all layers the same window and ignores layer_types.
    window = reader.optional_integer("sliding_window") if reader.switch("use_sliding_window") else None
    mixtures = has_experts(reader)
    kinds = [GLOBAL if window is None else SLIDING] * len(mixtures)
    if reader.layer_types(kinds) != kinds:
        reader.problem("layer_types of another kind than sliding_window says")
    count, experts = read_experts(reader, 128, normalized=reader.switch("norm_topk_prob"))
    return Description(
        layers=tuple(
            layer(
                Attention(rope=rope, window=window, head_norms=head_norms()),
                activation,
                qkv_bias=bias,
                o_bias=bias,
                experts=experts if mixture else None,
            )
            for mixture in mixtures
        ),
        num_experts=count,
        expert_size=reader.integer("moe_intermediate_size"),
    )


FAMILIES = (
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        describe=_describe,
        biases=("attention_bias",),
        mixtures=True,
        defaults={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
        },
    ),
)
