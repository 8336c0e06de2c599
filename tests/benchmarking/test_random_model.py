"""Random models of published shapes."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_shapes import TINY_HF

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding.statistics import weighted_mean
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.model.apply import Graded
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.parameters import parameter_shapes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-0.6B", 0.60),
        ("Qwen3-8B", 8.19),
        ("Qwen3-14B", 14.77),
        ("Qwen3-30B-A3B", 30.53),
        ("gpt-oss-20b", 20.91),
        ("gpt-oss-120b", 116.83),
        ("Llama-3.2-1B", 1.24),
        ("Llama-3.1-8B", 8.03),
        ("Qwen3-32B", 32.76),
        ("Llama-3.1-70B", 70.55),
    ],
)
def test_shapes_have_the_published_parameter_counts(name, billions):
    config = random_model.shape(name)
    total = sum(math.prod(shape) for arrays in parameter_shapes(config).values() for shape in arrays)
    if config.tie_word_embeddings:
        total -= config.vocab_size * config.hidden_size
    assert total / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.slow
def test_random_mixtures_read_the_requested_bits():
    mixture = {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
    config = ModelConfig.from_hf(TINY_HF | {"model_type": "qwen3_moe", "norm_topk_prob": True} | mixture)
    model = random_model.graded(config, compute_dtype=jnp.float32)
    thresholds = model_thresholds(model, jnp.asarray(random_model.TARGETS), jnp.float32(3))
    graded = Graded(thresholds)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 64))
    assert np.isfinite(model(tokens, graded)).all()
    bits = {name: float(bits.mean()) for name, bits in graded.bits.items()}
    assert weighted_mean(model, bits) == pytest.approx(3, abs=0.2)
    dense = random_model.dense(config, compute_dtype=jnp.float32)
    assert np.isfinite(dense(tokens)).all()


def test_an_unknown_shape_is_refused_by_name():
    with pytest.raises(UsageError, match=r"no shape is called 'Qwen3-9B'.*Qwen3-8B"):
        random_model.shape("Qwen3-9B")


def test_a_shape_can_come_from_the_directory_of_a_model(tmp_path):
    bundled = random_model.shape(str(BUNDLED_MODEL))
    assert (bundled.hidden_size, bundled.num_layers, bundled.vocab_size) == (256, 6, 8192)
    assert random_model.label(str(BUNDLED_MODEL)) == "qwen3-7m"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(random_model.hf_configs()["Llama-3.2-1B"]))
    assert random_model.shape(str(tmp_path)) == random_model.shape("Llama-3.2-1B")
    config.write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds list, expected an object"):
        random_model.shape(str(tmp_path))


def test_fitted_thresholds_give_every_target_on_their_sample():
    sample = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    table = np.asarray(random_model.fitted_thresholds(jnp.asarray(sample)))
    for target, thresholds in zip(random_model.TARGETS, table, strict=True):
        bits = 2 * np.sum(np.abs(sample)[:, None] >= thresholds, axis=1)
        assert np.mean(bits) == pytest.approx(target, abs=2e-3)
