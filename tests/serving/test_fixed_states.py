"""States of a fixed size in a conversation and in the engine: padding, slots, pages, whole prompts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from family_cases import CASES
from forward_passes import forward

from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.load_speculation import speculation_of
from grinqh_jax.decoding.prompt_cache import PromptCache
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.speculation.setting import SpeculationSetting
from grinqh_jax.errors import UsageError
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.serving.engine import Engine

HF_CONFIG = CASES["qwen3_5-tied-yarn"] | {"vocab_size": 300, "num_hidden_layers": 2}
STEPS = 6
PROMPTS = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (3, 41, 90)]
REQUEST = Request(temperature=0, max_tokens=STEPS, stop_tokens=())


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    return Generator.load(tiny_models.write(tmp_path_factory.mktemp("qwen3_5"), HF_CONFIG), jnp.float32)


def greedy(model: Decoder, prompt: list[int], steps: int = STEPS) -> list[int]:
    """Returns the most likely tokens, each from a forward pass without a cache; the padding comes later."""
    tokens = list(prompt)
    for _ in range(steps):
        padded = jnp.asarray([tokens + [0] * (128 - len(tokens))])
        tokens.append(int(jnp.argmax(forward(model, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("few_sizes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_conversation_reuses_the_state_after_a_prefill_chunk_of_the_last_prompt(generator, few_sizes):
    cache, prompt, reused = PromptCache(few_sizes=few_sizes), PROMPTS[2], []
    for turn in range(3):
        generation = generator.generate(prompt, REQUEST, prompt_cache=cache)
        list(generation)
        assert list(generation.tokens) == greedy(generator.model, prompt)
        reused.append(generation.statistics().reused_prompt_tokens)
        # The second prompt repeats 85 of 90 tokens, the third the whole second one.
        prompt = [*prompt[:-5], 11, 12] if turn == 0 else [*prompt, *generation.tokens, 7, 8, 9]
    assert reused == [0, 26 if few_sizes else 0, 87]  # 26: the first token of the preview.


@pytest.mark.slow
def test_the_engine_decodes_texts_of_several_lengths_in_slots_and_pages(generator):
    with Engine(generator, slots=2, max_context=128, page_size=16, prefill_chunk=32) as engine:
        for _ in range(2):  # A slot and its pages had another text before.
            answers = engine.generate_many(PROMPTS, REQUEST)
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                assert list(answer.tokens) == greedy(generator.model, prompt)
        assert engine.stats().reused_tokens == 0


def test_speculation_names_the_states_that_it_cannot_take_back(generator):
    with pytest.raises(UsageError, match="has recurrent states; use --speculate off"):
        speculation_of(SpeculationSetting("lookup"), generator)


@pytest.mark.slow
def test_texts_with_rings_equal_texts_with_whole_contexts(tmp_path):
    """Windows of 8 tokens: rings of 24 slots in a cache of 128, and prompts of up to 90 tokens."""
    config = CASES["ministral"] | {"vocab_size": 300}
    generator = Generator.load(tiny_models.write(tmp_path, config), jnp.float32)
    for prompt in PROMPTS:
        generation = generator.generate(prompt, REQUEST)
        for _ in generation:
            pass
        assert list(generation.tokens) == greedy(generator.model, prompt)
    # Drafts of a repeated prompt, of which the ring forgets those that are not accepted.
    repeated, lookup = [3, 4, 5, 6, 7, 8] * 8, speculation_of(SpeculationSetting("lookup"), generator)
    speculation = dataclasses.replace(lookup, always=True)
    generation = generator.generate(repeated, REQUEST, speculation=speculation)
    list(generation)
    assert list(generation.tokens) == greedy(generator.model, repeated)
    assert generation.statistics().speculation.drafted > 0
    sizes = {"slots": 2, "max_context": 128, "page_size": 16, "prefill_chunk": 32}
    with Engine(generator, **sizes, share_prefixes=False) as engine:
        for _ in range(2):
            answers = engine.generate_many(PROMPTS, REQUEST)
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                assert list(answer.tokens) == greedy(generator.model, prompt)
        assert engine.stats().reused_tokens == 0


@pytest.mark.slow
def test_rings_pass_from_chunk_to_chunk_with_drafts(tmp_path):
    config = CASES["ministral"] | {"vocab_size": 300}
    generator = Generator.load(tiny_models.write(tmp_path, config), jnp.float32)
    lookup = speculation_of(SpeculationSetting("lookup"), generator)
    prompts, steps = [[3, 4, 5, 6, 7, 8] * 8, [9, 10, 11] * 9], 40
    sizes = {"slots": 2, "max_context": 128, "page_size": 16, "prefill_chunk": 32, "share_prefixes": False}
    with Engine(generator, **sizes, speculation=dataclasses.replace(lookup, always=True)) as engine:
        answers = engine.generate_many(prompts, dataclasses.replace(REQUEST, max_tokens=steps))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.tokens) == greedy(generator.model, prompt, steps)
        assert answer.speculation.drafted > answer.speculation.accepted
