"""A tiny shape that the tests of benchmarks share."""

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model.config import ModelConfig

TINY_HF = random_model.hf_configs()["Qwen3-0.6B"] | {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TINY = ModelConfig.from_hf(TINY_HF)
