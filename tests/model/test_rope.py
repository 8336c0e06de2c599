"""The rotary embedding of every spelling of the configuration, against transformers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES as FAMILY_CASES
from random_models import TOKENS, state_tree
from rope_cases import CASES

from grinqh_jax.errors import UnsupportedModelError
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.rope import inverse_frequencies

FIXTURE = Path(__file__).parents[1] / "fixtures" / "rope_frequencies.npz"


def check(name: str, theirs: tuple[str, np.ndarray, float] | None) -> None:
    """Checks that the frequencies equal transformers', or that the configuration is refused by name."""
    try:
        config = ModelConfig.from_hf(CASES[name])
    except UnsupportedModelError as error:
        message = str(error)
    else:
        assert theirs is not None, name
        rope = config.layers[0].attention.rope
        np.testing.assert_allclose(
            inverse_frequencies(rope, config.head_dim), theirs[1], rtol=1e-5, err_msg=name
        )
        assert rope.attention_factor == pytest.approx(theirs[2], rel=1e-6), name
        return
    if theirs is None:
        return
    nested = "rope parameters for each kind of layer (full_attention)"  # ignored by transformers, silently
    assert nested in message or theirs[0] not in ("default", "linear", "llama3", "yarn", "longrope"), name
    assert nested in message or f"rope type '{theirs[0]}'" in message, name


def test_every_spelling_gives_the_recorded_frequencies_or_is_refused_by_name():
    recorded = np.load(FIXTURE)
    columns = (recorded[key].tolist() for key in ("names", "types", "frequencies", "attention_factors"))
    theirs = {name: values for name, *values in zip(*columns, strict=True)}
    assert theirs.keys() < CASES.keys()
    for name in CASES:
        check(name, theirs.get(name))


def test_every_spelling_gives_the_frequencies_of_transformers_or_is_refused_by_name():
    pytest.importorskip("torch")
    from record_logits import frequencies

    for name, config in CASES.items():
        check(name, frequencies(config))


@pytest.mark.parametrize(
    "name",
    [
        "llama-default-llama3_old_key-theta",
        "llama-llama3-absent-original",
        "qwen3-llama3_old_key-default-theta",
        "qwen3-yarn-default_with_factor-",
        "qwen3-two_types-empty-",
    ],
)
def test_contradicting_spellings_give_the_logits_of_transformers(name):
    pytest.importorskip("torch")
    from record_logits import logits, torch_model

    tokens = TOKENS % CASES[name]["vocab_size"]
    theirs = logits(torch_model(CASES[name]), tokens)
    ours = Decoder.from_tree(*state_tree(CASES[name]), jnp.float32)(tokens)
    assert np.max(np.abs(ours - theirs)) <= 1e-4 * np.max(np.abs(theirs))


def test_longrope_has_other_factors_in_texts_beyond_the_original_context():
    config = ModelConfig.from_hf(FAMILY_CASES["phi3-longrope"])
    rope = config.layers[0].attention.rope
    assert (config.max_position_embeddings, config.longest_text) == (64, 128)
    for tokens, factors in {
        0: rope.channel_factors,
        64: (1.0, 1.5, 2.0, 3.0),
        65: (2.0, 3.0, 4.0, 6.0),
    }.items():
        expected = 500.0 ** (-np.arange(0, 8, 2) / 8) / factors
        np.testing.assert_allclose(inverse_frequencies(rope, config.head_dim, tokens), expected, rtol=1e-6)
