"""Load on a server with OpenAI's protocol, and the times that its clients see. Imports no JAX."""

import dataclasses
import http.client
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from grinqh_jax.errors import UsageError

PERCENTILES = (50, 90, 99)

TEXT = (
    "The old house stood near the river, and nobody had lived there for many years. One day in autumn two "
    "children came down the road, opened the gate, and asked each other who might have planted the roses."
)
"""Text whose tokens random prompts consist of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A server and what is asked of it.

    Attributes:
      url: Base URL, without ``/v1``.
      key: API key, or None.
      model: Name of the model, or None for the server's only one.
      bits: Value of the field ``bits``, or None.
      max_tokens: Tokens of each answer; stop tokens do not end it.
      timeout: Most seconds between two pieces of a response.
    """

    url: str
    key: str | None = None
    model: str | None = None
    bits: float | str | None = None
    max_tokens: int = 128
    timeout: float = 600.0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Times of one request, in seconds.

    Attributes:
      started: Time of the request since the start of the run. In an open loop it is the planned time.
      events: Times of the events with text since ``started``.
      tokens: Number of generated tokens.
      prompt_tokens: Number of tokens of the prompt.
      realised_bits: Mean bits read per weight, or None.
      error: What went wrong, or None.
    """

    started: float
    events: tuple[float, ...] = ()
    tokens: int = 0
    prompt_tokens: int = 0
    realised_bits: float | None = None
    error: str | None = None


def random_prompts(target: Target, count: int, tokens: int, seed: int) -> list[list[int]]:
    """Returns prompts of random tokens of ``TEXT``, so that no two share a prefix.

    Raises:
      UsageError: The server cannot be reached or refuses.
    """
    vocabulary = _ask(target, "/v1/tokenize", {"prompt": TEXT})["tokens"]
    rng = random.Random(seed)
    return [rng.choices(vocabulary, k=tokens) for _ in range(count)]


def closed_loop(
    target: Target, prompts: Sequence[Any], concurrency: int, on_progress: Callable[[], None]
) -> tuple[list[Measurement], float]:
    """Keeps ``concurrency`` requests running until all prompts are answered.

    Args:
      target: The server.
      prompts: Texts or tokens.
      concurrency: Number of clients.
      on_progress: Callback after each request.

    Returns:
      Measurements, and the seconds of the whole run.
    """
    waiting: Iterator[Any] = iter(prompts)
    lock = threading.Lock()
    measured: list[Measurement] = []
    begun = time.perf_counter()

    def client() -> None:
        while True:
            with lock:
                prompt = next(waiting, None)
            if prompt is None:
                return
            one = _measure(target, prompt, begun, time.perf_counter())
            with lock:
                measured.append(one)
                on_progress()

    _run([threading.Thread(target=client, daemon=True) for _ in range(concurrency)])
    return measured, time.perf_counter() - begun


def open_loop(
    target: Target, prompts: Sequence[Any], rate: float, seed: int, on_progress: Callable[[], None]
) -> tuple[list[Measurement], float]:
    """Sends requests at random times (Poisson arrivals), no matter how fast the server answers.

    Args:
      target: The server.
      prompts: Texts or tokens.
      rate: Mean number of requests per second.
      seed: Seed of the times.
      on_progress: Callback after each request.

    Returns:
      Measurements, and the seconds of the whole run.
    """
    rng, lock = random.Random(seed), threading.Lock()
    measured: list[Measurement] = []
    threads = []
    begun = planned = time.perf_counter()
    for prompt in prompts:
        planned += rng.expovariate(rate)
        time.sleep(max(planned - time.perf_counter(), 0))

        def client(prompt: Any = prompt, planned: float = planned) -> None:
            one = _measure(target, prompt, begun, planned)
            with lock:
                measured.append(one)
                on_progress()

        threads.append(threading.Thread(target=client, daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return measured, time.perf_counter() - begun


def summary(measured: Sequence[Measurement], seconds: float) -> dict[str, Any]:
    """Returns the figures of a run. Times are in milliseconds; figures without a value are None.

    ``time_to_first_event``, ``time_between_events``, ``time_per_token`` (after the first event) and
    ``request`` have mean and percentiles. ``ends`` are the times at which the answers ended, in seconds since
    the start of the run. A figure counts requests that succeeded.
    """
    good = [one for one in measured if one.error is None and one.events]
    gaps = [b - a for one in good for a, b in zip(one.events, one.events[1:], strict=False)]
    per_token = [(one.events[-1] - one.events[0]) / (one.tokens - 1) for one in good if one.tokens > 1]
    tokens = sum(one.tokens for one in good)
    bits = [one.realised_bits for one in good if one.realised_bits is not None]
    errors: dict[str, int] = {}
    for one in measured:
        if one.error is not None:
            errors[one.error] = errors.get(one.error, 0) + 1
    return {
        "requests": len(measured),
        "failed": sum(errors.values()),
        "errors": errors,
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "prompt_tokens_per_second": sum(one.prompt_tokens for one in good) / seconds,
        "realised_bits": float(np.mean(bits)) if bits else None,
        "time_to_first_event": _percentiles([one.events[0] for one in good]),
        "time_between_events": _percentiles(gaps),
        "time_per_token": _percentiles(per_token),
        "request": _percentiles([one.events[-1] for one in good]),
        "ends": sorted(one.started + one.events[-1] for one in good),
    }


def _percentiles(seconds: Sequence[float]) -> Mapping[str, float | None]:
    if not seconds:
        return {"mean": None} | {f"p{each}": None for each in PERCENTILES}
    values = np.percentile(seconds, PERCENTILES) * 1e3
    named = {f"p{each}": float(value) for each, value in zip(PERCENTILES, values, strict=True)}
    return named | {"mean": float(np.mean(seconds)) * 1e3}


def _run(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _measure(target: Target, prompt: Any, begun: float, started: float) -> Measurement:
    """Sends one request and follows its events."""
    fields = {
        "prompt": prompt,
        "max_tokens": target.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events: list[float] = []
    usage: dict[str, Any] = {}
    error = None
    try:
        with _Response(target, "/v1/completions", fields) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                usage = event.get("usage") or usage
                if event["choices"] and event["choices"][0]["finish_reason"] is None:
                    events.append(time.perf_counter() - started)
        if not usage:
            raise ValueError("the response ended early")
    except (OSError, ValueError, UsageError, http.client.HTTPException) as failure:
        error = f"{' '.join(str(failure).split()):.200}" or type(failure).__name__
    return Measurement(
        started - begun,
        tuple(events),
        usage.get("completion_tokens", 0),
        usage.get("prompt_tokens", 0),
        usage.get("realised_bits"),
        error,
    )


def _ask(target: Target, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    try:
        with _Response(target, path, fields) as response:
            return json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UsageError(f"{target.url} does not answer ({error}); start a server or set --url") from None


class _Response:
    """The response to a POST request, as a context."""

    def __init__(self, target: Target, path: str, fields: dict[str, Any]):
        parts = urllib.parse.urlsplit(target.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {target.url!r} is not a URL such as http://127.0.0.1:8000")
        self._connection = kind(parts.hostname, parts.port, timeout=target.timeout)
        optional = {"model": target.model, "bits": target.bits if path == "/v1/completions" else None}
        fields = fields | {name: value for name, value in optional.items() if value is not None}
        headers = {"Content-Type": "application/json"}
        if target.key:
            headers["Authorization"] = f"Bearer {target.key}"
        self._request = ("POST", parts.path.rstrip("/") + path, json.dumps(fields), headers)

    def __enter__(self) -> http.client.HTTPResponse:
        self._connection.request(*self._request)
        response = self._connection.getresponse()
        if response.status != 200:
            body = response.read(10_000)
            try:
                message = json.loads(body)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = response.reason
            self._connection.close()
            raise UsageError(f"status {response.status}: {message}")
        return response

    def __exit__(self, *exception) -> None:
        self._connection.close()
