"""Generation defaults of a checkpoint."""

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
