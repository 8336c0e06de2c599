"""The engine for many requests with speculation: random requests, in company, cancelled, turned."""

import dataclasses
import random

import pytest

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.speculation.lookup import PromptLookup
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.serving.engine import Engine

pytestmark = pytest.mark.slow

SIZES = {"slots": 4, "max_context": 128, "page_size": 16, "prefill_chunk": 32}
SHORT = dataclasses.replace(policy.CPU, chunk_steps=4)
PHRASES = [
    b"the cat sat ",
    b"one two three ",
    b"abab",
    b"It was the best of times, it was the worst of times. ",
]


@pytest.fixture(scope="module")
def engine(generator):
    generator.holds_dial = True
    try:
        speculation = Speculation(PromptLookup(least=1), always=True)
        with Engine(generator, **SIZES, policy=SHORT, speculation=speculation) as engine:
            yield engine
    finally:
        generator.holds_dial = False


def random_case(rng: random.Random) -> tuple[list[int], Request]:
    """A prompt that repeats itself, and a request."""
    prompt = list((rng.choice(PHRASES) * 3)[: rng.randrange(4, 80)])
    sampled = rng.random() < 0.3
    return prompt, Request(
        bits=rng.choice([1.0, 2.5, 3.0, 5.75, "full"]),
        max_tokens=rng.randrange(1, 40),
        temperature=rng.choice([0.5, 1.0]) if sampled else 0.0,
        top_k=rng.choice([0, 5]) if sampled else 0,
        seed=rng.randrange(1000),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        logit_bias=rng.choice([{}, {}, {70: 4.0, 71: -100.0}]),
    )


def test_random_requests_compile_nothing_and_equal_the_generator(engine, generator, compilations):
    rng = random.Random(5)
    cases = [random_case(rng) for _ in range(60)]
    prompts, requests = zip(*cases, strict=True)
    answers = engine.generate_many(prompts, requests)
    assert not compilations
    assert sum(answer.speculation.accepted for answer in answers) > 100
    for answer, prompt, request in zip(answers, prompts, requests, strict=True):
        alone = generator.generate(prompt, request, max_context=128)
        list(alone)
        assert answer.tokens == alone.tokens
        assert answer.finish_reason == alone.finish_reason
        figures = answer.speculation
        assert figures.steps + figures.accepted == len(answer.tokens) - 1
        assert answer.statistics().to_json()["speculation"]["accepted"] == figures.accepted


def test_an_answer_with_logprobs_has_those_of_its_tokens(engine, generator):
    request = Request(bits=3.0, max_tokens=40, temperature=0.0, stop_tokens=())
    answers = [engine.submit(list(phrase * 9)[:60], request, top_logprobs=2) for phrase in PHRASES]
    for answer in answers:
        answer.result()
        assert [one.token for one in answer.logprobs] == answer.tokens
        for one in answer.logprobs:
            assert one.logprob == pytest.approx(one.top[0][1])
            assert one.token == one.top[0][0]
    assert sum(answer.speculation.accepted for answer in answers) > 0


def test_cancelled_answers_free_their_slots_and_harm_no_other(engine, generator):
    prompt = list(b"one two three one two three")
    request = Request(bits=3.0, max_tokens=60, temperature=0.0, stop_tokens=())
    alone = engine.generate_many([prompt], request)[0].tokens
    answers = [engine.submit(prompt, request) for _ in range(8)]
    for answer in answers[1::2]:
        next(iter(answer))
        engine.cancel(answer)
    for answer in answers:
        answer.result()
    for i, answer in enumerate(answers):
        if i % 2 == 0 or answer.finish_reason == "length":
            assert answer.tokens == alone
        else:
            assert answer.finish_reason == "cancelled"
            assert answer.tokens == alone[: len(answer.tokens)]
    assert engine.stats().pages_in_use == 0
