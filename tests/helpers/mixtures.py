"""Mixtures of experts: a tiny random one, and one made of a trained dense model."""

import json
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the dtype bfloat16)
import numpy as np
from safetensors.numpy import load_file, save_file

HF_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 72,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}
"""A mixture, and a dense layer behind it."""

NOISE = 0.15
"""Standard deviation of the experts of an upcycled model, relative to that of the dense weights."""

SCORES = 1.5
"""Standard deviation of the scores of its routers."""


def upcycle(dense: Path, directory: Path, *, experts: int, chosen: int) -> Path:
    """Writes a Qwen3-MoE checkpoint whose experts are noisy copies of the MLPs of a Qwen3 checkpoint.

    Activations and weights then have the distributions of a trained model. Routers are random.
    """
    directory.mkdir(parents=True)
    config = json.loads((dense / "config.json").read_text())
    width = config["intermediate_size"]
    config |= HF_CONFIG | {
        key: value for key, value in config.items() if key not in ("architectures", "model_type")
    }
    config |= {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": width}
    config |= {"mlp_only_layers": [], "layer_types": None}
    (directory / "config.json").write_text(json.dumps(config))
    rng, state = np.random.default_rng(0), {}
    for name, value in load_file(dense / "model.safetensors").items():
        prefix, mlp, projection = name.partition(".mlp.")
        if not mlp:
            state[name] = value
            continue
        values = value.astype(np.float32)
        for expert in range(experts):
            noise = NOISE * values.std() * rng.standard_normal(value.shape, np.float32)
            state[f"{prefix}.mlp.experts.{expert}.{projection}"] = (values + noise).astype(value.dtype)
        router = f"{prefix}.mlp.gate.weight"
        if router not in state:
            # The inputs of a router are normalised; norm scales differ from 1 by a small factor.
            router_kernel = rng.standard_normal((experts, config["hidden_size"]), np.float32)
            state[router] = (SCORES * config["hidden_size"] ** -0.5 * router_kernel).astype(value.dtype)
    save_file(state, directory / "model.safetensors")
    for file in dense.glob("*token*"):
        shutil.copy(file, directory)
    return directory
