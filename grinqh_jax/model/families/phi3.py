"""Phi-3 and Phi-4: fused projections, partial rotation, LongRoPE."""

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.families.family import TENSORS, Family, layer
from grinqh_jax.model.families.rope import read_rope
from grinqh_jax.model.layer_spec import Attention, Description
from grinqh_jax.model.rope import RopeType


def _describe(reader: ConfigReader) -> Description:
    window = reader.optional_integer("sliding_window")
    kinds = [GLOBAL if window is None else SLIDING] * reader.integer("num_hidden_layers")
    if reader.layer_types(kinds) != kinds:
        reader.problem("layer_types of another kind than sliding_window says")
    # Early configurations call LongRoPE "su" or "yarn".
    types: dict[str, RopeType] = {
        "default": "default",
        "longrope": "longrope",
        "su": "longrope",
        "yarn": "longrope",
    }
    rope = read_rope(reader, types=types, partial=True)
    spec = layer(Attention(rope=rope, window=window), reader.activation())
    return Description(layers=(spec,) * len(kinds))


FAMILIES = (
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        describe=_describe,
        tensors={
            **TENSORS,
            "layers.{i}.qkv.kernel": ("model.layers.{i}.self_attn.qkv_proj.weight",),
            "layers.{i}.gate_up.kernel": ("model.layers.{i}.mlp.gate_up_proj.weight",),
        },
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
)
