"""Conversations with a prompt cache: the same text as without one, and earlier turns are not read again."""

import dataclasses
import threading

import numpy as np
import pytest
from flax import nnx

from grinqh_jax.decoding import prefill_buckets
from grinqh_jax.decoding.engine.prompt import PREVIEW_TOKENS
from grinqh_jax.decoding.generation import Generation
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.prompt_cache import PromptCache
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.slots import answers, prompts
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.errors import UsageError

ANSWER = 20


@pytest.fixture(scope="module")
def generator(one_layer_generator):
    return one_layer_generator


@pytest.fixture(scope="module")
def talker(generator) -> Generator:
    """The tiny model with a longer context, and without end tokens that would shorten answers."""
    model = nnx.clone(generator.model)
    model.config = dataclasses.replace(model.config, max_position_embeddings=1024)
    return Generator(model, generator.tokenizer, GenerationConfig(), generator.targets, generator.directory)


@pytest.fixture
def tokens_read(monkeypatch) -> list[int]:
    """Number of prompt tokens of each prefill."""
    counts, original = [], Device.prefill

    def counting(device, prefix, bucket, settings):
        if bucket.lengths[0]:  # A rehearsal reads no tokens.
            counts.append(int(bucket.lengths[0]))
        return original(device, prefix, bucket, settings)

    monkeypatch.setattr(Device, "prefill", counting)
    return counts


def user_turn(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(2, 258, length).tolist()


def generated(talker, prompt, cache=None, max_context=None, **request) -> Generation:
    request = Request(**{"bits": 3.0, "max_tokens": ANSWER} | request)
    generation = talker.generate(prompt, request, prompt_cache=cache, max_context=max_context)
    list(generation)
    return generation


def conversation(talker, lengths, cache=None, **request) -> list[Generation]:
    """Generates an answer to every turn; each prompt quotes the turns and answers before it."""
    prompt, generations = [], []
    for length in lengths:
        prompt = prompt + user_turn(length)
        generations.append(generated(talker, prompt, cache, **request))
        prompt = prompt + generations[-1].tokens
    return generations


def texts(generations) -> list[list[int]]:
    return [generation.tokens for generation in generations]


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_conversation_has_the_same_text(talker, tokens_read, temperature):
    lengths = (70, 5, 80, 5)
    without = conversation(talker, lengths, temperature=temperature)
    assert tokens_read == [70, 95, 195, 220]
    tokens_read.clear()
    with_cache = conversation(talker, lengths, PromptCache(), temperature=temperature)
    assert texts(with_cache) == texts(without)
    assert len({tuple(text) for text in texts(without)}) == 4
    # A prefix of the previous prompt is reused, without the tokens of the preview.
    reused = [generation.statistics().reused_prompt_tokens for generation in with_cache]
    assert reused == [0, 95 - PREVIEW_TOKENS, 95, 220 - PREVIEW_TOKENS]
    assert tokens_read == [70, PREVIEW_TOKENS, 100, PREVIEW_TOKENS]
    for old, new in zip(without, with_cache, strict=True):
        assert old.statistics().prompt_tokens == new.statistics().prompt_tokens
        assert old.statistics().reused_prompt_tokens == 0
        np.testing.assert_allclose(new.grading_stats.bits, old.grading_stats.bits, atol=0.05)


def test_a_conversation_of_several_buckets_has_the_same_text(talker, tokens_read, monkeypatch):
    """The last bucket of a prompt may have too few tokens for a preview, and its predecessor has one."""
    # At full bits, because buckets of other sizes round differently, which may change the level of a channel.
    monkeypatch.setattr(prefill_buckets, "LARGEST_BUCKET", 128)
    lengths = (70, 40, 60)  # prompts of 70, 130 and 210 tokens
    without = conversation(talker, lengths, bits="full")
    assert tokens_read == [70, 128, 2, 128, 82]
    tokens_read.clear()
    cache = PromptCache()
    with_cache = conversation(talker, lengths, cache, bits="full")
    assert texts(with_cache) == texts(without)
    assert tokens_read == [70, 64, 2, 80]
    # The dial of a graded answer starts from the preview of both buckets, with the cache and without it.
    prompt = user_turn(70) + without[0].tokens + user_turn(40) + without[1].tokens + user_turn(60)
    old, new = generated(talker, prompt), generated(talker, prompt, cache)
    np.testing.assert_allclose(new.grading_stats.bits[0], old.grading_stats.bits[0], atol=0.05)


@pytest.mark.slow
def test_a_conversation_with_few_sizes_has_the_same_text_and_compiles_nothing_new(
    talker, tokens_read, compilations
):
    lengths = (70, 5, 80, 330, 5)
    without = conversation(talker, lengths, bits="full")
    tokens_read.clear()
    thread = threading.Thread(target=talker.compile_conversation, args=[Request(bits="full")])
    thread.start()
    thread.join()
    cache = PromptCache(few_sizes=True)
    first = conversation(talker, lengths[:1], cache, bits="full")  # compiles the small programs
    before = len(compilations)
    with_cache = conversation(talker, lengths, cache, bits="full")
    assert len(compilations) == before
    assert texts(with_cache) == texts(without)
    assert texts(first) == texts(without[:1])
    assert cache.capacity == 1024
    read = [6, 64, 64, 64, 36, 64, 286, 64, 64]
    assert tokens_read == read
    assert [g.statistics().compile_seconds < 0.2 for g in with_cache] == [True] * len(lengths)


@pytest.mark.slow
def test_the_cache_grows(talker):
    lengths = (150, 150)
    cache = PromptCache()
    capacities, with_cache, prompt = [], [], []
    for length in lengths:
        prompt = prompt + user_turn(length)
        with_cache.append(generated(talker, prompt, cache))
        prompt = prompt + with_cache[-1].tokens
        capacities.append(cache.capacity)
    assert capacities == [256, 512]
    assert texts(with_cache) == texts(conversation(talker, lengths))
    assert [g.statistics().reused_prompt_tokens for g in with_cache] == [0, 150]


def test_only_the_common_prefix_of_prompts_is_reused(talker):
    """The prompts have an edited history, a changed system prompt, and nothing in common."""
    first = user_turn(120)
    edited = first[:100] + [257 - token for token in first[100:]] + user_turn(50)
    other = user_turn(100, seed=1)
    cache = PromptCache()
    reused = []
    for prompt in (first, edited, [7, *edited[1:]], other, other):
        generation = generated(talker, prompt, cache)
        assert generation.tokens == generated(talker, prompt).tokens
        reused.append(generation.statistics().reused_prompt_tokens)
    assert reused == [0, 100, 0, 0, 100 - PREVIEW_TOKENS]


@pytest.mark.slow
def test_turns_with_other_settings_reuse_the_cache(talker):
    """A prefill writes the same keys and values at every setting of the dial."""
    cache, prompt = PromptCache(), user_turn(90)
    for request in ({"bits": 2.0}, {"bits": "full", "max_tokens": 5}, {"temperature": 1.0, "seed": 3}):
        generation = generated(talker, prompt, cache, **request)
        assert generation.tokens == generated(talker, prompt, **request).tokens
        prompt = prompt + generation.tokens + user_turn(30)
    assert generation.statistics().reused_prompt_tokens > 90


def test_the_context_ends_a_conversation(talker):
    """A refused prompt leaves the cache as it was."""
    cache, prompt = PromptCache(), user_turn(226)
    prompt = prompt + generated(talker, prompt, cache, max_context=256).tokens
    cut = generated(talker, prompt, cache, max_context=256)
    assert len(cut.tokens) == 256 - 246
    assert cut.finish_reason == "length"
    assert cut.tokens == generated(talker, prompt, max_context=256).tokens
    with pytest.raises(UsageError, match="the prompt has 261 tokens and the context holds 256"):
        generated(talker, prompt + user_turn(15), cache, max_context=256)
    assert cache.tokens == tuple(prompt)


def test_the_cache_is_usable_after_an_interrupted_answer(talker):
    cache, prompt = PromptCache(), user_turn(120)
    generation = talker.generate(prompt, Request(bits=3.0, max_tokens=60), prompt_cache=cache)
    pieces = iter(generation)
    next(pieces)
    next(pieces)
    assert 0 < len(generation.tokens) < 60
    prompt = prompt + generation.tokens + user_turn(30)
    following = generated(talker, prompt, cache)
    assert following.tokens == generated(talker, prompt).tokens
    assert following.statistics().reused_prompt_tokens == len(prompt) - PREVIEW_TOKENS
    with pytest.raises(UsageError, match="was passed to a later one"):
        list(pieces)
    again = generated(talker, prompt, cache)  # The late iterator has not changed the cache.
    assert again.tokens == following.tokens
    assert again.statistics().reused_prompt_tokens == len(prompt) - PREVIEW_TOKENS


@pytest.mark.parametrize(
    ("module", "program"), [(prompts, "prefill"), (answers, "insert"), (answers, "generate")]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_midway_leaves_a_usable_cache(talker, monkeypatch, module, program, error):
    """The exception comes at the worst moment: what the program took is donated, and its result is lost.

    Only ``insert`` takes no keys and values, so an interrupt of it leaves the whole prompt in the cache.
    """
    cache, prompt = PromptCache(), user_turn(120)
    prompt = prompt + generated(talker, prompt, cache).tokens + user_turn(30)
    expected = generated(talker, prompt).tokens
    original = getattr(module, program)

    class Failing:
        lower = original.lower

        def __call__(self, *args, **options):
            original(*args, **options)
            raise error

    monkeypatch.setattr(module, program, Failing())
    with pytest.raises(error):
        generated(talker, prompt, cache)
    monkeypatch.setattr(module, program, original)
    generation = generated(talker, prompt, cache)
    assert generation.tokens == expected
    is_whole = program == "insert" and error is KeyboardInterrupt
    reused = len(prompt) - PREVIEW_TOKENS if is_whole else 0
    assert generation.statistics().reused_prompt_tokens == reused
    assert generated(talker, prompt, cache).statistics().reused_prompt_tokens > 0


def test_an_interrupt_between_buckets_keeps_what_was_read(talker, monkeypatch):
    monkeypatch.setattr(prefill_buckets, "LARGEST_BUCKET", 128)
    cache, prompt = PromptCache(), user_turn(232)  # With the answer, 256 positions, as in other tests.
    original = Device.prefill

    def interrupted(device, prefix, bucket, settings):
        if bucket.lengths[0] == 104:
            raise KeyboardInterrupt
        return original(device, prefix, bucket, settings)

    monkeypatch.setattr(Device, "prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generated(talker, prompt, cache)
    assert cache.tokens == tuple(prompt[:128])
    monkeypatch.setattr(Device, "prefill", original)
    generation = generated(talker, prompt, cache)
    assert generation.statistics().reused_prompt_tokens == 128
    assert generation.tokens == generated(talker, prompt).tokens


def test_a_cache_belongs_to_one_model(talker):
    model = nnx.clone(talker.model)
    other = Generator(model, talker.tokenizer, talker.defaults, talker.targets, talker.directory)
    cache = PromptCache()
    generated(talker, user_turn(40), cache)
    with pytest.raises(UsageError, match="belongs to another model"):
        other.generate(user_turn(40), prompt_cache=cache)
    cache.clear()
    assert cache.tokens == ()
    assert generated(other, user_turn(40), cache).statistics().reused_prompt_tokens == 0


def test_an_unquantized_model_reads_only_what_is_new(one_layer_dense_directory):
    dense = Generator.load(one_layer_dense_directory)
    cache, prompt = PromptCache(), user_turn(40)
    first = generated(dense, prompt, cache, bits="full", max_tokens=10)
    prompt = prompt + first.tokens + user_turn(8)
    second = generated(dense, prompt, cache, bits="full", max_tokens=10)
    assert second.statistics().reused_prompt_tokens == 40
    assert second.tokens == generated(dense, prompt, bits="full", max_tokens=10).tokens
