"""Every family against transformers, with every option on, and with each option off."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, TOKENS, with_one_option_off
from random_models import state_tree

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.families import FAMILIES

RECORDED = np.load(Path(__file__).parents[1] / "fixtures" / "family_logits.npz")
TOLERANCE = 1e-4
"""Maximum difference of float32 logits, relative to the largest logit."""

PROMPT = 12
"""Number of tokens that a prefill reads before decoding; the windows are shorter."""


def model_of(hf_config: dict, seed: int = 0) -> Decoder:
    return Decoder.from_tree(*state_tree(hf_config, seed), jnp.float32)


def relative_difference(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def test_the_cases_cover_all_families():
    assert {config["model_type"] for config in CASES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_recorded_logits_and_every_option_matters(name):
    config, tree = state_tree(CASES[name])
    logits = Decoder.from_tree(config, tree, jnp.float32)(TOKENS[:1])[0, ::3]
    recorded = RECORDED[f"{name} logits"]
    assert relative_difference(logits, recorded) <= TOLERANCE
    options = []
    for option, changed, changed_tree in with_one_option_off(config, tree):
        logits = Decoder.from_tree(changed, changed_tree, jnp.float32)(TOKENS[:1])[0, ::3]
        assert relative_difference(logits, recorded) > 100 * TOLERANCE, option
        options.append(option)
    assert options


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    pytest.importorskip("torch")
    from record_logits import logits, torch_model

    theirs = logits(torch_model(CASES[name], seed=3), TOKENS)
    assert relative_difference(model_of(CASES[name], seed=3)(TOKENS), theirs) <= TOLERANCE


@jax.jit
def prefill_and_decode(model, tokens):
    """Returns logits from position ``PROMPT - 1`` on: of a prefill in two calls, then of decode steps."""
    cache, lengths = (
        KVCache.create(model.config, len(tokens), tokens.shape[1], jnp.float32),
        jnp.array([7, 7]),
    )
    _, cache = engine.prefill(model, tokens[:, :10], lengths, cache)  # 3 tokens of padding
    prompt, cache = engine.prefill(model, tokens[:, 7:PROMPT], jnp.array([PROMPT - 7] * 2), cache)

    def step(cache, token):
        logits, cache, _ = engine.decode_step(model, token, cache, None)
        return cache, logits

    _, logits = jax.lax.scan(step, cache, tokens[:, PROMPT:].T)
    return jnp.concatenate([prompt[None], logits]).swapaxes(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_decoding_with_a_cache_equal_one_pass(name):
    model = model_of(CASES[name])
    whole = np.asarray(model(TOKENS))[:, PROMPT - 1 :]
    assert relative_difference(prefill_and_decode(model, TOKENS), whole) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers(name):
    model, recorded = model_of(CASES[name]), RECORDED[f"{name} greedy"][0]
    cache = KVCache.create(model.config, 1, TOKENS.shape[1], jnp.float32)
    logits, cache = engine.prefill(model, TOKENS[:1, :PROMPT], jnp.array([PROMPT]), cache)
    first = jnp.argmax(logits, axis=-1)
    chunk, _ = engine.decode_chunk(
        model,
        first,
        jnp.array([False]),
        cache,
        None,
        Sampling.create(1),
        jnp.array([-1]),
        jnp.array([len(recorded) - 1]),
        steps=len(recorded) - 1,
    )
    assert [int(first[0]), *np.asarray(chunk.tokens[0]).tolist()] == recorded.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_of_2048_tokens_equal_transformers(name):
    pytest.importorskip("torch")
    from record_logits import logits, torch_model

    hf_config = CASES[name] | {"max_position_embeddings": 4096}
    if "original_max_position_embeddings" in hf_config:
        hf_config |= {"original_max_position_embeddings": 4096}
    tokens = np.random.default_rng(5).integers(0, hf_config["vocab_size"], (1, 2048))
    theirs = logits(torch_model(hf_config, seed=3), tokens)
    ours = jax.jit(lambda model: model(tokens))(model_of(hf_config, seed=3))
    assert relative_difference(ours, theirs) <= TOLERANCE
