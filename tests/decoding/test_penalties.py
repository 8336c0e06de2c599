"""Penalties on repeated tokens, against transformers and against formulas in numpy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from random_models import CONFIGS, graded_model

from grinqh_jax import Generator, Request
from grinqh_jax.decoding.engine.chunk import jitted_decode_chunk
from grinqh_jax.decoding.penalties import Penalties, TokenHistory, penalize
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.errors import GrinqhWarning, UsageError
from grinqh_jax.model.cache import KVCache

VOCABULARY = 40
PROMPTS = [[3, 3, 7], [1], [39, 0, 5, 5]]
TEXTS = [[7, 8, 8, 8], [2, 2, 9, 10], [0, 1, 0, 1]]


@pytest.fixture(scope="module")
def generator(one_layer_generator):
    return one_layer_generator


def history() -> TokenHistory:
    result = TokenHistory.of(PROMPTS, VOCABULARY)
    for tokens in zip(*TEXTS, strict=True):
        result = result.with_tokens(jnp.array(tokens), jnp.ones(3, bool))
    return result


def random_logits() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((3, VOCABULARY)).astype(np.float32) * 3


def test_presence_and_frequency_count_generated_tokens_only():
    presence, frequency = np.array([0.5, 0.0, -1.0]), np.array([0.0, 0.75, 2.0])
    penalties = Penalties(jnp.ones(3), jnp.float32(presence), jnp.float32(frequency))
    expected = random_logits().astype(np.float64)
    for row, text in enumerate(TEXTS):
        for token in set(text):
            expected[row, token] -= presence[row] + frequency[row] * text.count(token)
    np.testing.assert_allclose(penalize(random_logits(), penalties, history()), expected, rtol=1e-5)


def test_repetition_counts_prompt_and_text_as_in_transformers():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    rates = [1.3, 1.0, 0.6]
    penalties = Penalties(jnp.float32(rates), jnp.zeros(3), jnp.zeros(3))
    ours = penalize(random_logits(), penalties, history())
    for row, rate in enumerate(rates):
        tokens, logits = torch.tensor([PROMPTS[row] + TEXTS[row]]), torch.from_numpy(random_logits())
        theirs = RepetitionPenaltyLogitsProcessor(rate)(tokens, logits[row : row + 1])
        np.testing.assert_allclose(ours[row], theirs[0].numpy(), rtol=1e-6)


def test_rows_that_are_done_add_no_token():
    before = history()
    after = before.with_tokens(jnp.array([11, 12, 13]), jnp.array([True, False, True]))
    added = np.argwhere(np.asarray(after.generated - before.generated))
    assert added.tolist() == [[0, 11], [2, 13]]


@pytest.mark.parametrize("penalty", [1.15, *slow(1.0, 1.5, 3.0)])
def test_greedy_texts_equal_those_of_transformers(one_layer_dense_directory, penalty):
    torch = pytest.importorskip("torch")
    import transformers

    prompt = [*range(60, 80), 61, 62]
    generator = Generator.load(one_layer_dense_directory, jnp.float32)
    generation = generator.generate(prompt, Request(max_tokens=60, repetition_penalty=penalty))
    list(generation)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(one_layer_dense_directory, dtype=torch.float32)
    options = {"do_sample": False, "repetition_penalty": penalty, "eos_token_id": [0, 1], "pad_token_id": 0}
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, **options)
    assert generation.tokens == expected[0, len(prompt) :].tolist()


def run(generator, **options) -> list[int]:
    generation = generator.generate([5, 6, 7], Request(max_tokens=50, bits=4.0, **options))
    list(generation)
    return generation.tokens


@pytest.mark.slow
def test_large_penalties_forbid_repetition_at_any_chunk_boundary(generator):
    assert len(set(run(generator))) < 40  # the random model repeats itself
    tokens = run(generator, presence_penalty=100.0)
    assert len(tokens) == len(set(tokens))
    tokens = run(generator, frequency_penalty=100.0)
    assert len(tokens) == len(set(tokens))
    tokens = run(generator, repetition_penalty=1000.0)
    assert len({*tokens, 5, 6, 7}) == len(tokens) + 3


@pytest.mark.slow
def test_large_penalties_forbid_repetition_in_samples(generator):
    sampled = run(generator, frequency_penalty=100.0, temperature=1.0, top_k=200)
    assert len(sampled) == len(set(sampled))


def test_other_penalties_compile_nothing_and_no_penalties_run_another_program(generator, compilations):
    plain = run(generator)
    run(generator, repetition_penalty=1.5)
    before = len(compilations)
    run(generator, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=-0.1)
    assert run(generator, repetition_penalty=1.0, presence_penalty=0.0) == plain
    assert len(compilations) == before


def test_the_program_without_penalties_has_no_trace_of_them():
    model = graded_model("qwen3-tied-gqa")

    def program(sampling, history):
        cache = KVCache.create(model.config, 1, 64, jnp.float32)
        lowered = jitted_decode_chunk.lower(
            *(model, jnp.zeros(1, jnp.int32), jnp.zeros(1, bool), cache, None, sampling),
            *(jnp.array([-1]), jnp.ones(1, jnp.int32)),
            steps=2,
            policy=DecodePolicy.for_device(),
            history=history,
        )
        return lowered.as_text(debug_info=True)

    vocabulary = CONFIGS["qwen3-tied-gqa"]["vocab_size"]
    penalised = program(Sampling.create(repetition_penalty=1.1), TokenHistory.of([[1]], vocabulary))
    assert "penalties/" in penalised
    assert "penalties/" not in program(Sampling.create(), None)


def test_values_out_of_range_are_refused():
    message = r"repetition_penalty is 0, expected .*; presence_penalty is 101, expected -100"
    with pytest.raises(UsageError, match=message):
        Request(repetition_penalty=0.0, presence_penalty=101.0)


def test_defaults_come_from_generation_config_and_what_is_ignored_is_named(
    one_layer_dense_directory, tmp_path
):
    for file in one_layer_dense_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = json.loads((tmp_path / "generation_config.json").read_text())
    own |= {"repetition_penalty": 2.0, "num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    with pytest.warns(GrinqhWarning, match="num_beams 4, no_repeat_ngram_size 3$") as caught:
        generator = Generator.load(tmp_path, jnp.float32)
    assert len(caught) == 1
    assert generator.defaults.ignored == ("num_beams 4", "no_repeat_ngram_size 3")

    def tokens(model, **options):
        generation = model.generate([60, 61], Request(max_tokens=20, **options))
        list(generation)
        return generation.tokens

    plain = Generator.load(one_layer_dense_directory, jnp.float32)
    assert tokens(generator) == tokens(plain, repetition_penalty=2.0) != tokens(plain)
    assert tokens(generator, repetition_penalty=1.0) == tokens(plain)
