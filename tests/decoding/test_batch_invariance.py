"""Logits of a decode step on a CPU: bitwise the same for any number of texts and of tokens of a text."""

import os

import jax
import jax.numpy as jnp
import mesh_models
import numpy as np
import pytest
from family_cases import CASES
from marks import slow
from mixtures import HF_CONFIG
from random_models import TARGETS, graded_model

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.engine import step
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.flat_model import decoder_of

PROMPT = 9


@jax.jit
def read_tokens(model, tokens, cache, thresholds, counts):
    thresholds = {name: thresholds[name] for name in thresholds}
    return step.read_tokens(decoder_of(model), tokens, cache, thresholds, counts)[1:]


def assert_invariant(model, targets, shapes, bits):
    """Compares tokens that are read together with tokens that each text reads alone, one at a time."""
    rng = np.random.default_rng(3)
    most_texts, most_tokens = (max(sizes) for sizes in zip(*shapes, strict=True))
    tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (most_texts, PROMPT + most_tokens)))
    settings = jnp.asarray(np.resize(bits, most_texts), jnp.float32)
    thresholds = model_thresholds(model, jnp.array(targets), settings)

    def rows(texts):
        return jax.tree.map(lambda rows: rows[texts], thresholds)

    caches, alone = [], []
    for text in range(most_texts):
        empty = KVCache.create(model.config, 1, 48, model.compute_dtype)
        prompt = jnp.pad(tokens[text : text + 1, :PROMPT], ((0, 0), (0, 32 - PROMPT)))
        _, cache = engine.prefill(model, prompt, jnp.array([PROMPT]), empty)
        caches.append(cache)
        steps = []
        for i in range(most_tokens):
            new = tokens[text : text + 1, PROMPT + i : PROMPT + i + 1]
            logits, cache, stats = read_tokens(
                model, new, cache, rows(slice(text, text + 1)), jnp.ones(1, int)
            )
            steps.append((logits, stats.packed))
        alone.append(jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *steps))
    for texts, count in shapes:
        cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches[:texts])
        logits, _, stats = read_tokens(
            model,
            tokens[:texts, PROMPT : PROMPT + count],
            cache,
            rows(slice(0, texts)),
            jnp.full(texts, count),
        )
        for text in range(texts):
            one_logits, one_stats = alone[text]
            np.testing.assert_array_equal(logits[text], one_logits[0, :count])
            np.testing.assert_array_equal(stats.packed[text], one_stats[0, :count])


@pytest.mark.skipif(
    os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "1",
    reason="XLA (jax 0.10.2) fuses layers of 64 channels differently if a step has one row: 1e-6",
)
@pytest.mark.parametrize("shapes", [[(4, 4)], *slow([(1, 5), (4, 4)])])
def test_rows_are_independent_in_a_small_model(shapes):
    model = graded_model("qwen3-tied-gqa")
    assert_invariant(model, TARGETS, shapes, [2.0, 3.0, 8.0])


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "1", reason="as above")
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-moe", "olmoe"])
def test_rows_are_independent_in_a_small_mixture(name):
    """XLA computes routers token by token; ``qwen2-moe`` has a shared expert."""
    config = CASES[name] | {"hidden_size": 256}
    assert_invariant(mesh_models.model_of(config), TARGETS, [(1, 5), (4, 4)], [2.0, 3.0, 8.0])


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_programs")
def test_rows_are_independent_in_a_mixture():
    sizes = {"hidden_size": 256, "moe_intermediate_size": 384, "intermediate_size": 768, "head_dim": 64}
    config = ModelConfig.from_hf(HF_CONFIG | sizes)
    model = random_model.graded(config, compute_dtype=jnp.float32)
    assert_invariant(model, random_model.TARGETS, [(1, 8), (4, 1), (4, 4)], [2.0, 3.0, 8.0])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("name", ["bundled", "qwen3-32m"])
def test_rows_are_independent_in_a_trained_model(name, request):
    generator = Generator.load(
        BUNDLED_MODEL if name == "bundled" else request.getfixturevalue("converted_32m")
    )
    shapes = [(1, 2), (1, 4), (1, 8), (1, 16), (2, 8), (3, 5), (4, 4), (8, 2), (16, 1)]
    assert_invariant(generator.model, generator.targets, shapes, [2.0, 3.0, 4.0, 8.0])
