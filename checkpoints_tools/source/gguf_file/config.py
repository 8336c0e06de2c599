"""Builds a Hugging Face configuration from the metadata of a GGUF file."""

from typing import Any

import numpy as np

from checkpoints_tools.source.gguf_file.contents import GGUFFile
from checkpoints_tools.source.gguf_file.rope import llama3_scaling
from grinqh_jax.errors import CheckpointError, UnsupportedModelError
from grinqh_jax.model.families import FAMILIES

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
"""Supported values of ``general.architecture``, and model type and architecture in ``config.json``."""

EMBEDDING, HEAD, ROPE_DIVISORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_MIXTURE_SIZES = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_EPSILON = "attention.layer_norm_rms_epsilon"


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """Returns the ``config.json`` of the model in a GGUF file.

    Options that are not implemented, such as experts and sliding windows, are included, so that
    ``ModelConfig.from_hf`` refuses them by name.

    Raises:
      CheckpointError: Metadata or the embedding are missing.
      UnsupportedModelError: The architecture is not supported, or the scaling of the rotary embedding is not
        that of Llama 3.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: architecture {architecture!r} (supported in GGUF: {', '.join(ARCHITECTURES)})"
        )
    model_type, name = ARCHITECTURES[architecture]
    sizes = _SIZES | (_MIXTURE_SIZES if FAMILIES[model_type].mixtures else {})
    missing = [key for key in (*sizes.values(), _EPSILON) if f"{architecture}.{key}" not in metadata]
    if missing or EMBEDDING not in file.tensors:
        names = [f"{architecture}.{key}" for key in missing]
        names += [EMBEDDING] if EMBEDDING not in file.tensors else []
        raise CheckpointError(f"{file.path}: lacks {', '.join(names)}; download a complete file")

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        **{size: value(key) for size, key in sizes.items()},
        "num_key_value_heads": value("attention.head_count_kv", value("attention.head_count")),
        "rms_norm_eps": _shortest(value(_EPSILON)),
        "rope_theta": _shortest(value("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": HEAD not in file.tensors,
    }
    heads = config["num_attention_heads"]
    if isinstance(heads, int) and heads > 0:
        config["head_dim"] = head_dim = value("attention.key_length", config["hidden_size"] // heads)
        if value("attention.value_length", head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{file.path}: keys have {head_dim} channels and values {value('attention.value_length')}"
            )
        if (rotated := value("rope.dimension_count", head_dim)) != head_dim:
            config["partial_rotary_factor"] = rotated / head_dim
    if (window := value("attention.sliding_window")) is not None:
        raise UnsupportedModelError(f"{file.path}: sliding_window {window} is not supported in GGUF")
    if FAMILIES[model_type].mixtures:
        config["norm_topk_prob"] = True  # llama.cpp normalizes, and GGUF has no key for it.
    elif value("expert_count"):
        config["num_experts"] = value("expert_count")
    config |= _scaling(file, architecture, config["rope_theta"])
    for role in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{role}_token_id")) is not None:
            config[f"{role}_token_id"] = token
    return config


def _scaling(file: GGUFFile, architecture: str, theta: float) -> dict[str, Any]:
    """Returns ``rope_scaling``, if the frequencies are scaled."""
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind != "none":
        raise UnsupportedModelError(f"{file.path}: rope type {kind!r} is not supported in GGUF")
    if ROPE_DIVISORS not in file.tensors:
        return {}
    divisors = file.read(ROPE_DIVISORS)
    if np.all(divisors == 1):
        return {}
    scaling = llama3_scaling(divisors, theta)
    if scaling is None:
        raise UnsupportedModelError(
            f"{file.path}: {ROPE_DIVISORS} does not scale the rotary embedding as Llama 3 does"
        )
    return {"rope_scaling": scaling}


def _shortest(value: float) -> float:
    """Returns the decimal number with the fewest digits that is this float32: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(value)))
