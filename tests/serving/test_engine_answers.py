"""The engine under random requests, against the library's ``Generator`` and against requests alone."""

import dataclasses
import random

import numpy as np
import pytest
from engine_cases import SHORT, SIZES, SYSTEM, assert_equals_the_generator, random_case

from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.request import Request
from grinqh_jax.serving.engine import Engine

# They compile an engine. By default the tests of the server check its core.
pytestmark = pytest.mark.slow


def test_random_requests_compile_nothing_and_equal_the_generator(engine, generator, compilations):
    rng, count = random.Random(1), 200
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


def test_penalties_and_biases_are_those_of_the_generator(engine, generator):
    rng = random.Random(1)
    cases = [random_case(rng) for _ in range(60)]
    cases = [case for case in cases if case[1].repetition_penalty != 1 or case[1].logit_bias]
    answers = engine.generate_many([prompt for prompt, _ in cases], [request for _, request in cases])
    for case, answer in zip(cases, answers, strict=True):
        assert_equals_the_generator(answer, generator, *case)


def test_an_answer_is_the_same_alone_in_company_and_from_shared_pages(engine, monkeypatch):
    rng = random.Random(2)
    cases = [random_case(rng) for _ in range(16)]
    device, rows = engine.scheduler._device, set()
    generate = device.generate
    monkeypatch.setattr(
        device, "generate", lambda slots, *rest: (rows.add(len(slots)), generate(slots, *rest))[1]
    )
    together = engine.generate_many([prompt for prompt, _ in cases], [request for _, request in cases])
    assert rows == {1, 2, 4}
    rows.clear()
    for (prompt, request), answer in zip(cases, together, strict=True):
        engine.storage.allocator.forget()
        miss, hit = (engine.generate_many([prompt], request)[0] for _ in range(2))
        assert miss.reused_tokens == 0
        assert miss.tokens == hit.tokens == answer.tokens
        if miss.grading_stats is not None:
            assert (miss.grading_stats.packed == hit.grading_stats.packed).all()
            assert (miss.grading_stats.packed == answer.grading_stats.packed).all()
    assert any(answer.reused_tokens > 0 for answer in together)
    assert rows == {1}


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


def test_chunks_ahead_change_no_answer(generator, engine):
    rng = random.Random(7)
    cases = [random_case(rng) for _ in range(24)]
    prompts, requests = [prompt for prompt, _ in cases], [request for _, request in cases]
    ahead = dataclasses.replace(SHORT, early_exit=False, chunks_ahead=1)
    with Engine(generator, **SIZES, policy=ahead) as other:
        answers = other.generate_many(prompts, requests)
    assert [a.tokens for a in answers] == [a.tokens for a in engine.generate_many(prompts, requests)]


def test_the_bundled_model_answers_as_the_generator_does():
    generator = Generator.load(BUNDLED_MODEL)
    prompts = [
        "Once upon a time",
        "The cat sat on the mat. " * 18,
        "Lily and Tom went to the park.",
        "One day",
    ]
    requests = [Request(bits=bits, max_tokens=40, temperature=0) for bits in (2.0, 3.0, 4.0, "full")]
    with Engine(generator, slots=4, max_context=192, page_size=16, prefill_chunk=64) as engine:
        answers = engine.generate_many(prompts, requests)
    for prompt, request, answer in zip(prompts, requests, answers, strict=True):
        alone = generator.generate(prompt, request, max_context=192)
        list(alone)
        assert answer.tokens == alone.tokens
        assert answer.text == alone.text
        np.testing.assert_array_equal(answer.grading_stats.bits, alone.grading_stats.bits)
