"""Requests of an engine: cancelling, priorities, the dial, stops, biases, log probabilities."""

import asyncio
import dataclasses

import numpy as np
import pytest
from engine_cases import SIZES, SYSTEM

from grinqh_jax.decoding import prefill_buckets
from grinqh_jax.decoding.request import Request
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.scoring import _next_tokens
from grinqh_jax.model.flat_model import FlatModel

# They compile an engine. By default the tests of the server check its core.
pytestmark = pytest.mark.slow


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


def test_many_turns_cost_a_round_one(engine, monkeypatch):
    dispatch, turn, turned = engine.scheduler.dispatch, engine.scheduler.turn, []

    def dispatch_and_turn():
        dispatch()
        for bits in (2.0, 7.0, 3.0):
            engine.turn(answer, bits)

    monkeypatch.setattr(
        engine.scheduler, "turn", lambda job, bits: turned.append((job.dispatched, bits)) or turn(job, bits)
    )
    monkeypatch.setattr(engine.scheduler, "dispatch", dispatch_and_turn)
    answer = engine.submit([7, 8, 9], Request(max_tokens=40, bits=1.5, stop_tokens=()))
    answer.result(60)
    assert len(turned) > 5
    assert {bits for _, bits in turned} == {3.0}
    assert len({dispatched for dispatched, _ in turned}) == len(turned)  # a chunk between two of them


def test_a_dial_turned_while_a_prompt_is_read_starts_like_the_one_of_the_request(engine, monkeypatch):
    """The last bucket has fewer tokens than a preview, so the preview is that of the one before the turn."""
    monkeypatch.setattr(prefill_buckets, "LARGEST_BUCKET", 64)
    request = Request(max_tokens=40, bits=1.5, temperature=1.0, seed=4, stop_tokens=())
    dispatch, answers = engine.scheduler.dispatch, []
    for unread in (0, 1):
        turned: list[int] = []

        def dispatch_and_turn(unread=unread, turned=turned):
            dispatch()
            (job,) = engine._jobs.values()
            if len(job.buckets) == unread and not turned:
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
    prompt = [*SYSTEM, *[200] * 9]  # several prefill chunks
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


def test_a_request_for_each_prompt_or_one_for_all(engine):
    with pytest.raises(UsageError, match="2 prompts and 1 requests; give one for each, or one for all"):
        engine.generate_many([[5], [6]], [Request()])
