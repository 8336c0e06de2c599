"""What a client gets when an answer or the engine fails, and when there is no room."""

import asyncio
import collections
import json
import threading
import time

import app_exchange
import pytest
from app_exchange import Response
from starlette.requests import Request

from grinqh_jax.decoding.answer_text import AnswerText
from grinqh_jax.server.app import application
from grinqh_jax.server.limits import ConnectionLimit, Limits
from grinqh_jax.server.service import Service

GOOD = {"prompt": "The cat", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
CRASH = GOOD | {"stop": "CRASH", "max_tokens": 40}


@pytest.fixture(scope="module")
def service(library, library_engine):
    return Service("tiny", library, library_engine, Limits(queue=4))


def exchange(service, *bodies: dict, limit=None) -> list[Response]:
    """Asks for completions at once; returns the responses."""
    app = application(service)
    if limit is not None:
        app = ConnectionLimit(app, *limit)
    return app_exchange.exchange(app, *(("/v1/completions", body) for body in bodies))


def assert_all_is_free(service) -> None:
    """Cancelled answers end within a chunk. Later tests need an idle engine."""
    assert service.admission.held == 0
    deadline = time.monotonic() + 30
    while service.engine.stats().pages_in_use and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.engine.stats().pages_in_use == 0


@pytest.fixture
def crashes(monkeypatch):
    """Answers whose stop string is CRASH fail after a few tokens."""
    push, pushed = AnswerText.push, collections.Counter()

    def failing(self, tokens):
        if "CRASH" in self._stop_strings._strings:
            if pushed[self] > 10:
                time.sleep(0.2)  # The first tokens have been sent by then.
                raise RuntimeError("secret")
            pushed[self] += len(tokens)
        return push(self, tokens)

    monkeypatch.setattr(AnswerText, "push", failing)


@pytest.mark.slow
def test_a_crash_of_one_answer_harms_no_other(service, crashes, caplog):
    (alone,) = exchange(service, GOOD)
    failed = service.metrics.answers.labels("failed")._value.get()
    responses = exchange(service, GOOD, CRASH, GOOD, CRASH | {"stream": True}, GOOD)
    for response in responses[::2]:
        assert (response.status, response.json["choices"]) == (200, alone.json["choices"])
    assert responses[1].status == 500
    assert responses[1].json["error"] == {
        "message": "the server failed on this request; its log has the reason",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    *_, last = [line for line in responses[3].text.splitlines() if line.startswith("data: ")]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "secret" not in responses[1].text + responses[3].text
    assert "secret" in caplog.text
    assert service.metrics.answers.labels("failed")._value.get() == failed + 2
    assert service.engine.error is None
    assert service.engine.stats().pages_in_use == 0
    assert service.admission.held == 0


def test_a_full_queue_says_when_to_try_again(service):
    responses = exchange(service, GOOD | {"n": 5, "max_tokens": 100}, GOOD | {"n": 2})
    assert [response.status for response in responses] == [200, 429]
    assert responses[1].headers["Retry-After"] == "1"
    error = responses[1].json["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert error["message"] == "5 answers run or wait and the server holds 6; try again later"


def test_too_many_connections_say_when_to_try_again(service):
    (refused,) = exchange(service, GOOD, limit=(7, lambda: 8))
    assert refused.status == 503
    assert (refused.headers["Retry-After"], refused.headers["Connection"]) == ("1", "close")
    assert refused.json["error"] == {
        "message": "there are more than 7 connections; try again later",
        "type": "server_error",
        "param": None,
        "code": "too_many_connections",
    }
    (answered,) = exchange(service, GOOD, limit=(7, lambda: 7))
    assert answered.status == 200


def test_a_small_request_does_not_wait_for_the_texts_of_large_ones(service):
    def of_size(size: int) -> Request:
        return Request({"type": "http", "headers": [(b"content-length", str(size).encode())]})

    async def run() -> int:
        ready = threading.Event()
        large = [service.in_thread(of_size(1 << 20), ready.wait, 60) for _ in range(40)]  # more than threads
        waiting = asyncio.gather(*large)
        small = asyncio.wait_for(service.in_thread(of_size(1000), lambda: 5), 30)
        try:
            return await small
        finally:
            ready.set()
            await waiting

    assert asyncio.run(run()) == 5


def test_an_answer_that_takes_too_long_is_cut(library, library_engine):
    service = Service("tiny", library, library_engine, Limits(request_seconds=1e-3))
    for fields in ({}, {"stream": True}):
        (response,) = exchange(service, GOOD | fields | {"max_tokens": 100})
        assert response.status == 504
        error = response.json["error"]
        assert (error["type"], error["code"]) == ("server_error", "timeout")
        assert error["message"] == "the answer did not end within 0.001 s; ask for fewer tokens"
    assert service.metrics.answers.labels("timeout")._value.get() == 2
    assert_all_is_free(service)


def test_answers_that_a_drain_does_not_wait_for_end_with_an_error(library, library_engine):
    service = Service("tiny", library, library_engine, Limits())
    long = GOOD | {"max_tokens": 100, "n": 4}

    async def cut() -> None:
        while not service.engine.stats().decoding:
            await asyncio.sleep(0.001)
        service.cut()

    app = application(service)
    requests = [("/v1/completions", long), ("/v1/completions", long | {"stream": True})]
    whole, stream = app_exchange.exchange(app, *requests, beside=cut)
    assert (whole.status, whole.headers["Retry-After"]) == (503, "5")
    last = [line for line in stream.text.splitlines() if line][-1]
    errors = whole.json["error"], json.loads(last.removeprefix("data: "))["error"]
    for error in errors:
        assert (error["type"], error["code"]) == ("server_error", "ending")
        assert error["message"] == "the server is shutting down; try again later"
    assert_all_is_free(service)


def test_an_engine_that_has_ended_answers_503(service, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(service.engine, "_closed", MemoryError("secret"))
        responses = exchange(service, GOOD, GOOD | {"stream": True})
    for response in responses:
        assert response.status == 503
        assert response.headers["Retry-After"] == "5"
        assert response.json["error"]["code"] == "engine_ended"
        assert "secret" not in response.text
