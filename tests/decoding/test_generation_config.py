"""The generation defaults of a checkpoint: special tokens, sampling and penalties."""

import json

import pytest

from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.errors import CheckpointError


def load(path, own: dict | None, model: dict | None = None) -> GenerationConfig:
    for name, value in (("generation_config.json", own), ("config.json", model)):
        if value is not None:
            (path / name).write_text(json.dumps(value))
    return GenerationConfig.load(path)


def test_several_eos_tokens_and_sampling(tmp_path):
    own = {
        "bos_token_id": 7,
        "eos_token_id": [3, 4],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    assert load(tmp_path, own) == GenerationConfig(
        bos_token=7, eos_tokens=(3, 4), temperature=0.6, top_k=20, top_p=0.95
    )


def test_greedy_without_do_sample_and_tokens_from_the_model_config(tmp_path):
    config = load(tmp_path, {"temperature": 0.6, "top_k": 20}, {"eos_token_id": 5, "bos_token_id": None})
    assert config == GenerationConfig(eos_tokens=(5,))


def test_absent_files_give_the_defaults(tmp_path):
    assert load(tmp_path, None) == GenerationConfig()


def test_all_malformed_values_are_named(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, {"do_sample": True, "top_p": 1.5, "temperature": "hot", "eos_token_id": "x"})
    for text in ("top_p is 1.5", "temperature is 'hot'", "eos_token_id is 'x'"):
        assert text in str(caught.value)


def test_keys_that_would_change_the_text_are_named_and_neutral_ones_are_not(tmp_path):
    neutral = {
        "num_beams": 1,
        "typical_p": 1.0,
        "bad_words_ids": None,
        "no_repeat_ngram_size": 0,
        "max_length": 9,
    }
    assert load(tmp_path, neutral).ignored == ()
    greedy = {"typical_p": 0.9, "bad_words_ids": [[5]], "num_beams": 2, "suppress_tokens": []}
    assert load(tmp_path, greedy).ignored == ("num_beams 2", "bad_words_ids [[5]]")
    assert load(tmp_path, {"do_sample": True, "typical_p": 0.9}).ignored == ("typical_p 0.9",)


def test_penalties_count_for_greedy_texts_too(tmp_path):
    own = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.2}
    assert load(tmp_path, own) == GenerationConfig(**own)
    with pytest.raises(CheckpointError, match=r"repetition_penalty is 0, expected a number, 0\.001 to 1,000"):
        load(tmp_path, {"repetition_penalty": 0})
