"""GGUF files with the weights and the tokenizer of a Hugging Face directory, as llama.cpp converts them."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import tokenizers

from grinqh_jax.model.config import ModelConfig

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}

EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def gguf_name(name: str) -> str:
    """Returns the GGUF name of a Hugging Face tensor."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"


def with_stacked_experts(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns weights by GGUF name; each tensor of experts has all experts of a layer."""
    named, experts = {}, {}
    for name, value in state.items():
        if match := EXPERTS.fullmatch(name):
            experts.setdefault(f"blk.{match[1]}.ffn_{match[3]}_exps.weight", {})[int(match[2])] = value
        else:
            named[gguf_name(name)] = value
    return named | {name: np.stack([values[e] for e in sorted(values)]) for name, values in experts.items()}


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """Returns a query or key projection in the order of llama.cpp: rotated pairs are neighbours."""
    result = np.empty_like(w)
    width = len(w) // heads
    for head in range(heads):
        for i in range(width // 2):
            result[head * width + 2 * i] = w[head * width + i]
            result[head * width + 2 * i + 1] = w[head * width + i + width // 2]
    return result


def divisors(config: ModelConfig) -> np.ndarray:
    """Returns the divisors of the frequencies of a Llama 3 model, frequency by frequency."""
    rope, result = config.layers[0].attention.rope, []
    for i in range(config.head_dim // 2):
        wavelength = 2 * np.pi * rope.theta ** (2 * i / config.head_dim)
        turns = rope.original_max_position_embeddings / wavelength
        if turns > rope.high_freq_factor:
            result.append(1.0)
        elif turns < rope.low_freq_factor:
            result.append(rope.factor)
        else:
            smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            result.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.array(result, np.float32)


def write(
    path: Path,
    hf_config: dict,
    state: dict[str, np.ndarray],
    *,
    matrix_type: str = "F32",
    tokenizer: tokenizers.Tokenizer | None = None,
    pre: str = "gpt-2",
    chat_template: str | None = None,
    metadata: dict | None = None,
) -> Path:
    """Writes a GGUF file.

    Args:
      path: File to write.
      hf_config: The model's ``config.json``.
      state: Weights by Hugging Face name.
      matrix_type: Type of the matrices; vectors are F32.
      tokenizer: Byte-level BPE tokenizer; none is written without it.
      pre: Name of its pre-tokenizer.
      chat_template: Its chat template.
      metadata: More metadata: strings, integers, floats or booleans. They replace those of the model; None
        removes one.
    """
    config = ModelConfig.from_hf(hf_config)
    name = {"qwen3_moe": "qwen3moe"}.get(config.family, config.family)
    values = {
        f"{name}.vocab_size": config.vocab_size,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_heads,
        f"{name}.attention.head_count_kv": config.num_kv_heads,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.value_length": config.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.dimension_count": config.head_dim,
        f"{name}.rope.freq_base": config.layers[0].attention.rope.theta,
        "general.license": "apache-2.0",
    }
    if config.mixture is not None:
        values |= {
            f"{name}.expert_count": config.num_experts,
            f"{name}.expert_used_count": config.mixture.chosen,
            f"{name}.expert_feed_forward_length": config.expert_size,
        }
    writer = gguf.GGUFWriter(path, name)
    for key, value in (values | (metadata or {})).items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab_size, pre)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for tensor, value in with_stacked_experts(state).items():
        if name == "llama" and ("attn_q." in tensor or "attn_k." in tensor):
            value = permuted(value, config.num_heads if "attn_q." in tensor else config.num_kv_heads)
        kind = gguf.GGMLQuantizationType[matrix_type if value.ndim > 1 else "F32"]
        stored = gguf.quantize(np.ascontiguousarray(value, np.float32), kind)
        writer.add_tensor(tensor, stored, raw_dtype=kind)
    if config.layers[0].attention.rope.type == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer, size: int, pre: str) -> None:
    """Adds vocabulary and merges; numbers without a token become unused tokens."""
    state = json.loads(tokenizer.to_str())
    numbers = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([numbers.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(
        [
            types.UNUSED
            if i not in numbers
            else (types.CONTROL if added[i] else types.USER_DEFINED)
            if i in added
            else types.NORMAL
            for i in range(size)
        ]
    )
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
