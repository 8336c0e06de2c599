"""Tiny models with random weights that depend only on a name and a seed."""

import zlib

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from grinqh_jax.hf import params
from grinqh_jax.hf.stored_together import as_stored
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.output_projection import block_sizes
from grinqh_jax.model.parameters import norms
from pallas_kernels import quantize

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
}
_LLAMA = _SMALL | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_QWEN3 = _SMALL | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS = {
    "llama3-scaled-rope-gqa": _LLAMA
    | {
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
        "rope_scaling": _LLAMA3_SCALING | {"rope_type": "llama3"},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "llama-tied-mha": _LLAMA | {"num_hidden_layers": 3, "tie_word_embeddings": True, "rope_theta": 10000.0},
    "llama3-tied-wide-head": _LLAMA
    | {
        "head_dim": 24,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3_SCALING | {"rope_type": "llama3", "rope_theta": 500.0},
        "dtype": "float32",
    },
    "qwen3-tied-gqa": _QWEN3
    | {
        "head_dim": 32,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None,
        "use_sliding_window": False,
        "layer_types": ["full_attention", "full_attention"],
    },
    "qwen3-untied": _QWEN3
    | {"head_dim": 16, "num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 1000000.0},
}
"""Hugging Face configurations, one per combination of options, in old and new spellings."""

TOKENS = np.random.default_rng(7).integers(0, _SMALL["vocab_size"], (2, 40))
"""Tokens that logits are compared on, more than the original context of the scaled rope."""


def random_state(hf_config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns float32 weights by Hugging Face name, so large that attention, norms and biases matter."""
    config = ModelConfig.from_hf(hf_config)
    return as_stored(config, _random_sources(config, seed))


def _random_sources(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    state = {}
    for key, parts in params.sources(config).items():
        for source in parts:
            rng = np.random.default_rng([seed, zlib.crc32(source.name.encode())])
            values = rng.standard_normal(source.shape, dtype=np.float32)
            if key.endswith(".scale"):
                values = 1 - norms(config)[key.removesuffix(".scale")].offset + 0.3 * values
            elif not key.endswith((".bias", ".sinks", ".log_decay", ".step_bias")):
                values *= source.shape[1] ** -0.5 * 1.5
            state[source.name] = values
    return state


def state_tree(hf_config: dict, seed: int = 0) -> tuple[ModelConfig, dict]:
    """Returns the same weights as a state tree of dense layers."""
    config = ModelConfig.from_hf(hf_config)
    state = _random_sources(config, seed)
    flat = {}
    for key, parts in params.sources(config).items():
        flat[key] = params.from_tensors(config, key, [state[part.name] for part in parts])
    return config, unflatten_dict(flat, sep=".")


def graded_model(name: str, *, max_bits: int = 8, compute_dtype=jnp.float32) -> Decoder:
    """Returns a model of ``CONFIGS`` in nested codes, with hand-made thresholds for ``TARGETS``."""
    config, tree = state_tree(CONFIGS[name])
    return Decoder.from_tree(config, graded_model_tree(tree, max_bits), compute_dtype)


TARGETS = (1.0, 4.5, 8.0)
"""Approximate mean bits of the rows of the threshold tables in ``graded_tree``."""


def graded_model_tree(tree: dict, max_bits: int = 8) -> dict:
    """Converts a model's dense state tree to nested codes, with the vocabulary in another order."""
    kernel = tree["lm_head"]["kernel"]
    order = np.random.default_rng(3).permutation(kernel.shape[1])
    ends = np.cumsum(block_sizes(kernel.shape[1]))
    blocks = [graded_tree({"kernel": kernel[:, tokens]}, max_bits) for tokens in np.split(order, ends[:-1])]
    blocks = {str(i): block for i, block in enumerate(blocks)}
    head = {"columns": jnp.asarray(np.argsort(order), jnp.int32), "blocks": blocks}
    layers = {name: part for name, part in tree.items() if name != "lm_head"}
    return graded_tree(layers, max_bits) | {"lm_head": head}


def graded_tree(tree: dict, max_bits: int = 8) -> dict:
    """Returns a dense state tree with every kernel replaced by nested codes."""
    if "kernel" not in tree:
        return {k: graded_tree(v, max_bits) if isinstance(v, dict) else v for k, v in tree.items()}
    weight = quantize(jnp.asarray(tree["kernel"], jnp.float32), max_bits=max_bits)
    scale = np.linspace(1, 0, len(TARGETS))[:, None]
    return {
        "planes": weight.planes,
        "scales": weight.scales,
        "thresholds": jnp.asarray(scale * np.array([0.7, 1.4, 2.4, 3.5])[: max_bits // 2], jnp.float32),
        "gains": jnp.asarray([*np.array([0.8, 0.9, 1.05])[: max_bits // 2 - 1], 1.0], jnp.float32),
        "max_activation": jnp.float32(2.0),
        **({"bias": tree["bias"]} if "bias" in tree else {}),
    }
