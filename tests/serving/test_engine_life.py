"""An engine from its sizes and programs to its failures and its end."""

import dataclasses
import functools
import gc
import random
import threading
import time

import numpy as np
import pytest
from engine_cases import SHORT, SIZES, random_case

from grinqh_jax.decoding.answer_text import AnswerText
from grinqh_jax.decoding.batching.scheduler import Scheduler
from grinqh_jax.decoding.paged_cache import count_pages, page_bytes
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.rehearsal import compile_all, lowerings
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.errors import UsageError
from grinqh_jax.memory import memory_in_use
from grinqh_jax.serving import engine as engine_module
from grinqh_jax.serving import sizes
from grinqh_jax.serving.engine import Engine
from grinqh_jax.serving.errors import EngineError
from grinqh_jax.serving.shared_pages import SharedPages

# They compile an engine. By default the tests of the server check its core.
pytestmark = pytest.mark.slow


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
    with pytest.raises(
        UsageError, match="a prefill chunk of 40 tokens is not a multiple of the page size 16"
    ):
        Engine(generator, **SIZES | {"prefill_chunk": 40})
    with pytest.raises(
        UsageError, match="pages of 0 tokens and prefill chunks of 32: choose at least 1 for both"
    ):
        Engine(generator, **SIZES | {"page_size": 0})


def test_pages_fit_into_free_memory(generator, monkeypatch):
    config, pages = generator.model.config, {"slots": 4, "max_context": 128, "page_size": 16}
    page = page_bytes(config, 16, np.float32, None)
    count = functools.partial(count_pages, config, np.float32, **pages)
    assert count(cache_memory=None, free=None) == count(cache_memory=None, free=10**12) == 32
    assert count(cache_memory=50 * page, free=None) == 50
    assert count(cache_memory=None, free=10 * page) == 8
    assert count(cache_memory=8 * page, free=10 * page) == 8
    with pytest.raises(
        UsageError, match=f"9 cache pages of 16 tokens take {9 * page} B, and {10 * page} B are free"
    ):
        count(cache_memory=9 * page, free=10 * page)
    monkeypatch.setattr(sizes, "free_memory", lambda: 1000)
    with pytest.raises(UsageError, match="and 1000 B are free; choose less cache memory"):
        Engine(generator, **SIZES)


def test_all_programs_of_an_engine_are_lowered_in_advance(generator, compilations):
    """They are compiled several at once, and running them afterwards compiles nothing."""
    settings = generator.settings(Request(temperature=1.0, presence_penalty=1.0), 1)
    shape = Shape(slots=2, max_context=64, page_size=8, prefill_chunk=32, num_pages=20, stop_tokens=1)
    device = Device(generator.model, generator.dial(None), shape, SHORT, settings)
    programs, chunks = Programs(), [(False, False), (True, False), (False, True)]
    programs.compile(lowerings(device, [32, 64], settings, chunks, logprobs=(False, True)))
    assert len(compilations) >= 10
    before = len(compilations)
    compile_all(device, programs, settings)
    assert len(compilations) == before


@pytest.mark.parametrize("method", ["push", "flush"])
def test_a_failure_of_one_answer_leaves_the_others(engine, monkeypatch, method):
    def fail(self, *arguments):
        raise ValueError("no such text")

    Broken = type("Broken", (AnswerText,), {method: fail})
    request = Request(max_tokens=20, bits=3.0)
    expected = engine.generate_many([[7, 8]], request)[0].text
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "AnswerText", Broken)
        broken = engine.submit([5, 6], request)
    other = engine.submit([7, 8], request)
    with pytest.raises(EngineError, match="the answer failed: ValueError"):
        broken.result(60)
    assert broken.finish_reason is None
    assert other.result(60) == expected
    assert engine.error is None
    assert engine.stats().pages_in_use == 0


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
    slow = scheduler._in_flight._reader.submit(time.sleep, 0.3)
    assert set(threading.enumerate()) - before
    scheduler.close()
    assert slow.done()
    assert set(threading.enumerate()) == before
