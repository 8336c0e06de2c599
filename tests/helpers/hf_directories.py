"""Tiny Hugging Face checkpoints with random weights, single-file or sharded."""

import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from grinqh_jax.hf import params
from grinqh_jax.hf.stored_together import as_stored
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.parameters import norms

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}


def random_state(hf_config: dict) -> dict[str, np.ndarray]:
    """Returns bfloat16 weights by Hugging Face name, large enough for attention and norms to matter."""
    state, config = {}, ModelConfig.from_hf(hf_config)
    for key, parts in params.sources(config).items():
        for name, shape in ((part.name, part.shape) for part in parts):
            values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
            if key.endswith(".scale"):
                values = 1 - norms(config)[key.removesuffix(".scale")].offset + 0.2 * values
            elif not key.endswith((".bias", ".sinks", ".log_decay", ".step_bias")):
                values *= shape[1] ** -0.5
            state[name] = values.astype(ml_dtypes.bfloat16)
    return as_stored(config, state)


def write(directory: Path, hf_config: dict = QWEN3, state: dict | None = None, shards: int = 0) -> Path:
    """Writes a checkpoint as one file, or as ``shards`` files with an index, and returns its directory."""
    state = random_state(hf_config) if state is None else state
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config))
    if not shards:
        save_file(state, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard, names in enumerate(np.array_split(sorted(state), shards)):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({str(name): state[name] for name in names}, directory / file)
        weight_map |= {str(name): file for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
