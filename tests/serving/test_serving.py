"""The engine under random requests, against the library's ``Generator`` and against requests alone."""

import asyncio
import dataclasses
import functools
import gc
import random
import threading
import time

import numpy as np
import pytest

from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.decoding import policy, prefill_buckets
from grinqh_jax.decoding.answer_text import AnswerText
from grinqh_jax.decoding.device import Device
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.job import Shape
from grinqh_jax.decoding.paged_cache import count_pages, page_bytes
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.scheduler import Scheduler
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.scoring import _next_tokens
from grinqh_jax.memory import memory_in_use
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.serving import engine as engine_module
from grinqh_jax.serving.engine import Engine
from grinqh_jax.serving.job import EngineError
from grinqh_jax.serving.shared_pages import SharedPages

SIZES = {"slots": 4, "max_context": 128, "page_size": 16, "piece": 32}
SHORT = dataclasses.replace(policy.CPU, chunk_steps=2)
SYSTEM = list(range(40, 130))


@pytest.fixture(scope="module")
def engine(generator):
    with Engine(generator, **SIZES, prompt_logprobs=True, policy=SHORT) as engine:
        yield engine


def random_case(rng: random.Random) -> tuple[list[int], Request]:
    """A prompt, with a common beginning or not, and a request."""
    shared = SYSTEM[: rng.choice([0, 32, 90, 90])]
    prompt = shared + [rng.randrange(2, 258) for _ in range(rng.randrange(1, 20))]
    sampled = rng.random() < 0.3
    return prompt, Request(
        bits=rng.choice([1.0, 2.5, 3.0, 5.75, "full"]),
        max_tokens=rng.randrange(1, 7),
        temperature=rng.choice([0.5, 1.0]) if sampled else 0.0,
        top_k=rng.choice([0, 5]) if sampled else 0,
        top_p=rng.choice([0.7, 1.0]) if sampled else 1.0,
        seed=rng.randrange(1000),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        logit_bias=rng.choice([{}, {}, {70: 4.0, 71: -100.0}]),
    )


def assert_equals_the_generator(answer, generator, prompt, request):
    alone = generator.generate(prompt, request, max_context=128)
    list(alone)
    assert answer.tokens == alone.tokens
    assert answer.finish_reason == alone.finish_reason


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_random_requests_compile_nothing_and_equal_the_generator(engine, generator, compilations, count):
    rng = random.Random(1)
    cases = [random_case(rng) for _ in range(count)]
    answers = [engine.submit(*case, top_logprobs=2 if i % 7 == 0 else None) for i, case in enumerate(cases)]
    for answer in answers:
        answer.result(60)
    assert not compilations
    assert engine.storage.allocator.in_use == 0
    assert sum(answer.reused_tokens > 0 for answer in answers) > count / 10
    for (_, request), answer in zip(cases, answers, strict=True):
        assert answer.finish_reason == ("stop" if answer.tokens[-1] in (0, 1) else "length")
        assert len(answer.tokens) == request.max_tokens or answer.finish_reason == "stop"
        assert answer.text == generator.tokenizer.decode(answer.tokens)
    plain = [i for i, (_, request) in enumerate(cases) if request.repetition_penalty == 1]
    for i in [i for i in plain if not cases[i][1].logit_bias][::12]:
        assert_equals_the_generator(answers[i], generator, *cases[i])


@pytest.mark.slow
def test_many_slots_read_one_level_of_at_least_the_bits_that_each_asks_for(generator, compilations):
    sizes = SIZES | {"slots": 18}
    rng = random.Random(3)
    with Engine(generator, **sizes, policy=SHORT) as engine:
        compilations.clear()
        cases = [random_case(rng) for _ in range(30)]
        answers = [engine.submit(*case) for case in cases]
        for answer in answers:
            answer.result(60)
        alone = engine.submit(SYSTEM, Request(bits=2.5, max_tokens=9))
        alone.result(60)
        assert not compilations
    levels = set()
    for (_, request), answer in zip(cases, answers, strict=True):
        figures = answer.statistics()
        assert figures.reading == "one level"
        if figures.realised_bits is not None:  # The first token comes from the prefill.
            assert figures.realised_bits >= (8 if request.bits == "full" else request.bits)
            levels |= set(np.unique(figures.realised_bits_per_step))
    assert levels == {6, 8}
    assert alone.statistics().realised_bits == 6
    assert "at one level, because more than 16" in "\n".join(alone.statistics().lines())


def test_up_to_16_slots_are_graded(engine):
    answer = engine.submit(SYSTEM, Request(bits=2.5, max_tokens=9))
    answer.result(60)
    figures = answer.statistics()
    assert figures.reading == "graded"
    assert figures.realised_bits < 4
    assert not any("one level" in line for line in figures.lines())


@pytest.mark.slow
def test_penalties_and_biases_are_those_of_the_generator(engine, generator):
    rng = random.Random(1)
    cases = [random_case(rng) for _ in range(60)]
    cases = [case for case in cases if case[1].repetition_penalty != 1 or case[1].logit_bias]
    answers = engine.generate_many([prompt for prompt, _ in cases], [request for _, request in cases])
    for case, answer in zip(cases, answers, strict=True):
        assert_equals_the_generator(answer, generator, *case)


def test_an_answer_is_the_same_alone_in_company_and_from_shared_pages(engine):
    rng = random.Random(2)
    cases = [random_case(rng) for _ in range(16)]
    together = engine.generate_many([prompt for prompt, _ in cases], [request for _, request in cases])
    for (prompt, request), answer in zip(cases, together, strict=True):
        engine.storage.allocator.forget()
        miss, hit = (engine.generate_many([prompt], request)[0] for _ in range(2))
        assert miss.reused_tokens == 0
        assert miss.tokens == hit.tokens == answer.tokens
        if miss.grading_stats is not None:
            assert (miss.grading_stats.packed == hit.grading_stats.packed).all()
            assert (miss.grading_stats.packed == answer.grading_stats.packed).all()
    assert any(answer.reused_tokens > 0 for answer in together)


def test_eviction_changes_no_answer(engine):
    request = Request(max_tokens=17, bits=3.0, temperature=1.0, stop_tokens=())
    prompts = [[*SYSTEM, *[200] * 20], [*reversed(SYSTEM), *[201] * 20], [*SYSTEM, *[200] * 20]]
    allocator = engine.storage.allocator
    allocator.forget()
    expected = [engine.generate_many([prompt], request)[0] for prompt in prompts]
    allocator.forget()
    held, evicted = allocator.allocate(allocator.num_pages - 9), allocator.evicted
    answers = [engine.generate_many([prompt], request)[0] for prompt in prompts]  # Each takes 8 of 9 pages.
    allocator.release(held)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.reused_tokens for answer in expected] == [0, 0, 32]
    assert [answer.reused_tokens for answer in answers] == [0, 0, 0]
    assert allocator.evicted > evicted
    assert allocator.in_use == 0


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(generator, engine):
    with pytest.raises(UsageError, match="the prompt has 128 tokens and the context holds 128"):
        engine.submit([5] * 128)
    small = SharedPages(dataclasses.replace(engine.shape, num_pages=7), graded=True)
    small.check(100, 12)
    with pytest.raises(
        UsageError, match="answer of 28 take 8 cache pages of 16 tokens, and the cache has 7;"
    ):
        small.check(100, 28)
    with pytest.raises(UsageError, match=r"cache memory 100 B: a page of 16 tokens takes \d+ B"):
        Engine(generator, **SIZES, cache_memory=100)
    with pytest.raises(UsageError, match="slots 65: 1 to 64 requests"):
        Engine(generator, slots=65)
    with pytest.raises(UsageError, match="a piece of 40 tokens is not a multiple of the page size 16"):
        Engine(generator, **SIZES | {"piece": 40})


def test_pages_fit_into_free_memory(generator, monkeypatch):
    config, sizes = generator.model.config, {"slots": 4, "max_context": 128, "page_size": 16}
    page = page_bytes(config, 16, np.float32, None)
    count = functools.partial(count_pages, config, np.float32, **sizes)
    assert count(cache_memory=None, free=None) == count(cache_memory=None, free=10**12) == 32
    assert count(cache_memory=50 * page, free=None) == 50
    assert count(cache_memory=None, free=10 * page) == 8
    assert count(cache_memory=8 * page, free=10 * page) == 8
    with pytest.raises(
        UsageError, match=f"9 cache pages of 16 tokens take {9 * page} B, and {10 * page} B are free"
    ):
        count(cache_memory=9 * page, free=10 * page)
    monkeypatch.setattr(engine_module, "free_memory", lambda: 1000)
    with pytest.raises(UsageError, match="and 1000 B are free; choose less cache memory"):
        Engine(generator, **SIZES)


@pytest.mark.slow
def test_all_programs_of_an_engine_are_lowered_in_advance(generator, compilations):
    """They are compiled several at once, and running them afterwards compiles nothing."""
    settings = generator.settings(Request(temperature=1.0, presence_penalty=1.0), 1)
    shape = Shape(slots=2, max_context=64, page_size=8, piece=32, num_pages=20, stop_tokens=1)
    device = Device(generator.model, generator.dial(None), shape, SHORT, settings)
    programs, chunks = Programs(), [(False, False), (True, False), (False, True)]
    programs.compile(device.lowerings([32, 64], settings, chunks, logprobs=(False, True)))
    assert len(compilations) >= 10
    before = len(compilations)
    device.compile(programs)
    assert len(compilations) == before


def test_a_cancelled_answer_ends_and_frees_its_slot_and_pages(engine):
    long = Request(max_tokens=100, bits=3.0, temperature=1.0)

    async def consume(answer, pieces: int) -> None:
        seen = 0
        async for _ in answer:
            seen += 1
            if seen == pieces:
                engine.cancel(answer)

    async def run() -> list:
        answers = [engine.submit([7, 8, 9, i], long) for i in range(10)]
        engine.cancel(answers[9])  # still in the queue
        await asyncio.gather(*(consume(answer, 1 + i % 2) for i, answer in enumerate(answers[:6])))
        for answer in answers[6:9]:
            answer.result(60)
        return answers

    answers = asyncio.run(run())
    assert {answer.finish_reason for answer in answers[:6]} <= {"cancelled", "stop"}
    assert answers[9].finish_reason == "cancelled"
    assert not answers[9].tokens
    assert all(answer.finish_reason != "cancelled" for answer in answers[6:9])
    assert all(len(answer.tokens) < 100 for answer in answers[:6])
    engine.generate_many([[5, 6]])
    assert engine.storage.allocator.in_use == 0
    assert len(engine.scheduler._free_slots) == SIZES["slots"]


def test_no_token_arrives_after_the_chunk_in_which_an_answer_is_cancelled(engine):
    lengths = []
    answer = engine.submit([7, 8, 9], Request(max_tokens=100, bits=3.0, stop_tokens=()))
    receive = answer.receive

    def cancelling(*arrived):
        stopped = receive(*arrived)
        if len(answer.tokens) > 20:
            lengths.append(len(answer.tokens))
            engine.cancel(answer)
        return stopped

    answer.receive = cancelling
    assert answer.result(60) == answer.text
    assert answer.finish_reason == "cancelled"
    assert [len(answer.tokens)] == lengths


def test_a_priority_comes_first_and_others_in_order(engine):
    order = []
    request = Request(max_tokens=20, bits=3.0)
    blockers = [engine.submit([9, i], Request(max_tokens=100, bits=3.0)) for i in range(4)]
    answers = {name: engine.submit([4, 5], request, priority=p) for name, p in (("a", 1), ("b", 1), ("c", 0))}
    for name, answer in answers.items():
        begin = answer.begin
        answer.begin = lambda reused, name=name, begin=begin: (order.append(name), begin(reused))
    for answer in (*blockers, *answers.values()):
        answer.result(60)
    assert order == ["c", "a", "b"]


def test_the_dial_is_turned_while_an_answer_runs(engine):
    answer = engine.submit([7, 8, 9], Request(max_tokens=100, bits=1.5, temperature=1.0, seed=4))
    pieces = iter(answer)
    next(pieces)
    next(pieces)  # a decode chunk of two tokens
    engine.turn(answer, 6.0)
    list(pieces)
    means = answer.grading_stats.bits.mean(axis=1)
    assert means[-20:].mean() > means[:2].mean() + 2
    with pytest.raises(UsageError, match="bits 99"):
        engine.turn(answer, 99.0)


def test_a_dial_turned_while_a_prompt_is_read_starts_like_the_one_of_the_request(engine, monkeypatch):
    """The last bucket has fewer tokens than a preview, so the preview is that of a piece before the turn."""
    monkeypatch.setattr(prefill_buckets, "LARGEST_BUCKET", 64)
    request = Request(max_tokens=40, bits=1.5, temperature=1.0, seed=4, stop_tokens=())
    dispatch, answers = engine.scheduler.dispatch, []
    for unread in (0, 1):
        turned: list[int] = []

        def dispatch_and_turn(unread=unread, turned=turned):
            dispatch()
            (job,) = engine._jobs.values()
            if len(job.pieces) == unread and not turned:
                turned.append(unread)
                engine.scheduler.turn(job, 6.0)

        monkeypatch.setattr(engine.scheduler, "dispatch", dispatch_and_turn)
        answers += engine.generate_many([SYSTEM[:70]], request)
        assert turned
    after, during = answers
    assert during.tokens == after.tokens
    assert (during.grading_stats.packed == after.grading_stats.packed).all()
    assert during.grading_stats.bits[-10:].mean() > 5


def test_a_stop_string_ends_an_answer(engine, generator):
    request = Request(max_tokens=60, bits=3.0, temperature=1.0, seed=11)
    free = engine.generate_many([[50, 51]], request)[0].text
    stop = free[10:12]
    answer = engine.generate_many([[50, 51]], dataclasses.replace(request, stop=stop))[0]
    assert answer.text == free[: free.index(stop)]
    assert answer.finish_reason == "stop"
    assert generator.tokenizer.decode(answer.tokens[:-1]) in answer.text + stop


def test_log_probabilities_are_those_of_the_model(engine, generator):
    prompt = [50, 51, 52]
    request = Request(
        max_tokens=24, bits="full", temperature=1.0, seed=3, logit_bias={60: 2.0}, stop_tokens=()
    )
    answer = engine.submit(prompt, request, top_logprobs=3)
    pieces = list(answer)
    assert [token for piece in pieces for token in piece.tokens] == answer.tokens
    assert [token for piece in pieces for token in piece.logprobs] == answer.logprobs
    assert [token.token for token in answer.logprobs] == answer.tokens
    expected, _, _ = _next_tokens(FlatModel(generator.model), np.array([prompt + answer.tokens]), None)
    found = [token.logprob for token in answer.logprobs]
    np.testing.assert_allclose(found, expected[0, len(prompt) - 1 :], atol=0.01)
    for token in answer.logprobs:
        values = [value for _, value in token.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert dict(token.top).get(token.token, token.logprob) == token.logprob <= values[0]
    greedy = engine.submit(prompt, Request(max_tokens=12, bits=3.0), top_logprobs=0)
    assert greedy.result(60) == engine.generate_many([prompt], Request(max_tokens=12, bits=3.0))[0].text
    assert all(token.top == [] for token in greedy.logprobs)
    assert next(iter(engine.generate_many([prompt])[0])).logprobs is None
    with pytest.raises(UsageError, match="top_logprobs is 21, expected 0 to 20"):
        engine.submit(prompt, top_logprobs=21)


def test_log_probabilities_of_a_prompt_are_those_of_the_model(engine, generator):
    prompt = [*SYSTEM, *[200] * 9]  # several pieces
    request = Request(max_tokens=2, bits=3.0)
    plain = engine.generate_many([prompt], request)[0]
    answer = engine.submit(prompt, request, top_logprobs=1, prompt_logprobs=True)
    next(iter(answer))
    assert [token.token for token in answer.prompt_logprobs] == prompt[1:]
    expected, greedy, _ = _next_tokens(FlatModel(generator.model), np.array([prompt]), None)
    found = [token.logprob for token in answer.prompt_logprobs]
    np.testing.assert_allclose(found, expected[0], atol=0.01)
    top = [token.top[0] for token in answer.prompt_logprobs]
    assert [most == token for (most, _), token in zip(top, prompt[1:], strict=True)] == greedy[0].tolist()
    answer.result(60)
    assert answer.tokens == plain.tokens
    assert answer.reused_tokens == 0
    one = engine.submit([9], request, top_logprobs=1, prompt_logprobs=True)
    one.result(60)
    assert one.prompt_logprobs == []
    with pytest.raises(UsageError, match="prompt_logprobs needs an engine created with"):
        engine.submit(prompt, request, prompt_logprobs=True)


def test_a_biased_token_is_chosen_or_never_chosen(engine, generator):
    always = Request(max_tokens=9, logit_bias={70: 100.0})
    assert engine.generate_many([[5, 6]], always)[0].tokens == [70] * 9
    free = engine.generate_many([[5, 6]], Request(max_tokens=9))[0].tokens
    never = engine.generate_many([[5, 6]], Request(max_tokens=9, logit_bias={free[0]: -100.0}))[0]
    assert free[0] not in never.tokens
    with pytest.raises(UsageError, match="token 258 is outside"):
        engine.submit([5], Request(logit_bias={258: 1.0}))


def test_stop_tokens_belong_to_a_request(engine):
    bias = {0: 100.0}
    assert engine.generate_many([[5, 6]], Request(max_tokens=9, logit_bias=bias))[0].tokens == [0]
    endless = Request(max_tokens=9, logit_bias=bias, stop_tokens=())
    assert engine.generate_many([[5, 6]], endless)[0].tokens == [0] * 9
    free = engine.generate_many([[5, 6]], Request(max_tokens=9))[0].tokens
    answer = engine.generate_many([[5, 6]], Request(max_tokens=9, stop_tokens=[free[4]]))[0]
    assert answer.tokens == free[: free.index(free[4]) + 1]
    assert answer.finish_reason == "stop"
    with pytest.raises(UsageError, match="17 stop tokens; at most 16"):
        engine.submit([5], Request(stop_tokens=range(17)))


def test_statistics_count_requests_pages_and_tokens(engine, generator):
    before = engine.stats()
    request = Request(max_tokens=8, bits=3.0, stop_tokens=())
    prompt = [*SYSTEM, *SYSTEM[:20]]
    answers = [engine.generate_many([prompt], request)[0] for _ in range(2)]
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 2 * 110
    reused = sum(answer.reused_tokens for answer in answers)
    assert after.reused_tokens - before.reused_tokens == reused >= 32
    assert (after.waiting, after.reading, after.decoding, after.pages_in_use) == (0, 0, 0, 0)
    assert after.pages_kept > 0
    figures = answers[1].statistics()
    assert (figures.prompt_tokens, figures.generated_tokens) == (110, 8)
    assert figures.reused_prompt_tokens == answers[1].reused_tokens
    assert figures.prompt_seconds > 0 < figures.generation_seconds
    generation = generator.generate(prompt, request, max_context=128)
    list(generation)
    alone = generation.statistics()
    assert figures.realised_bits == pytest.approx(alone.realised_bits)
    assert figures.bytes_per_token == pytest.approx(alone.bytes_per_token)


def test_a_failure_of_one_answer_leaves_the_others(engine, monkeypatch):
    class Broken(AnswerText):
        def push(self, tokens):
            raise ValueError("no such text")

    request = Request(max_tokens=20, bits=3.0)
    expected = engine.generate_many([[7, 8]], request)[0].text
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "AnswerText", Broken)
        broken = engine.submit([5, 6], request)
    other = engine.submit([7, 8], request)
    with pytest.raises(EngineError, match="the answer failed: ValueError"):
        broken.result(60)
    assert other.result(60) == expected
    assert engine.error is None
    assert engine.stats().pages_in_use == 0


@pytest.mark.slow
def test_memory_is_flat_in_later_rounds(engine):
    def round_of_requests(seed: int) -> int:
        rng = random.Random(seed)
        cases = [random_case(rng) for _ in range(60)]
        engine.generate_many([prompt for prompt, _ in cases], [request for _, request in cases])
        gc.collect()
        return memory_in_use()

    round_of_requests(4)
    before, after = round_of_requests(5), round_of_requests(6)
    assert after - before < 16 << 20
    assert not engine._jobs


@pytest.mark.slow
def test_chunks_ahead_change_no_answer(generator, engine):
    rng = random.Random(7)
    cases = [random_case(rng) for _ in range(24)]
    prompts, requests = [prompt for prompt, _ in cases], [request for _, request in cases]
    ahead = dataclasses.replace(SHORT, early_exit=False, chunks_ahead=1)
    with Engine(generator, **SIZES, policy=ahead) as other:
        answers = other.generate_many(prompts, requests)
    assert [a.tokens for a in answers] == [a.tokens for a in engine.generate_many(prompts, requests)]


def test_a_failure_ends_all_answers_and_close_ends_the_engine(generator, monkeypatch):
    with Engine(generator, **SIZES, policy=SHORT) as failing:
        submitted = threading.Event()
        monkeypatch.setattr(failing.scheduler, "_launch", lambda: submitted.wait(60) / 0)
        answers = [failing.submit([5, 6, i]) for i in range(6)]
        submitted.set()
        for answer in answers:
            with pytest.raises(EngineError, match="the engine ended before the answer: division by zero"):
                answer.result(60)
        with pytest.raises(EngineError, match="takes no requests, because it ended: division by zero"):
            failing.submit([5])
    closed = Engine(generator, **SIZES, policy=SHORT)
    answer = closed.submit([5, 6, 7], Request(max_tokens=100))
    closed.close()
    with pytest.raises(EngineError, match="it was closed"):
        answer.result(60)


def test_close_ends_the_thread_that_waits_for_results(engine):
    ahead = dataclasses.replace(SHORT, chunks_ahead=1)
    before = set(threading.enumerate())
    scheduler = Scheduler(engine.scheduler._device, engine.storage, ahead)
    slow = scheduler._reader.submit(time.sleep, 0.3)
    assert set(threading.enumerate()) - before
    scheduler.close()
    assert slow.done()
    assert set(threading.enumerate()) == before


@pytest.mark.slow
def test_the_bundled_model_answers_as_the_generator_does():
    generator = Generator.load(BUNDLED_MODEL)
    prompts = [
        "Once upon a time",
        "The cat sat on the mat. " * 18,
        "Lily and Tom went to the park.",
        "One day",
    ]
    requests = [Request(bits=bits, max_tokens=40, temperature=0) for bits in (2.0, 3.0, 4.0, "full")]
    with Engine(generator, slots=4, max_context=192, page_size=16, piece=64) as engine:
        answers = engine.generate_many(prompts, requests)
    for prompt, request, answer in zip(prompts, requests, answers, strict=True):
        alone = generator.generate(prompt, request, max_context=192)
        list(alone)
        assert answer.tokens == alone.tokens
        assert answer.text == alone.text
        np.testing.assert_array_equal(answer.grading_stats.bits, alone.grading_stats.bits)
