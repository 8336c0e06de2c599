"""Metrics for Prometheus: answers, times, tokens, bits, and the state of the engine."""

import time
from collections.abc import Callable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from grinqh_jax.decoding.statistics import Statistics
from grinqh_jax.serving.answer import Answer
from grinqh_jax.serving.engine import Engine
from grinqh_jax.serving.stats import EngineStats

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 1, 2, 5, 10)
_SLOW = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_BITS = tuple(half / 2 for half in range(2, 17))


class Metrics:
    """Metrics of one server.

    Attributes:
      registry: Registry that has only these metrics.
      responses: Responses by path and HTTP status.
      answers: Answers by outcome: a finish reason, ``disconnected``, ``timeout`` or ``failed``.
    """

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        self.responses = Counter(
            "grinqh_http_responses", "HTTP responses", ["path", "status"], registry=registry
        )
        self.answers = Counter("grinqh_answers", "Answers by outcome", ["outcome"], registry=registry)
        self._prompt_tokens = Counter("grinqh_prompt_tokens", "Tokens of prompts", registry=registry)
        self._reused_tokens = Counter(
            "grinqh_reused_prompt_tokens", "Tokens of prompts from shared cache pages", registry=registry
        )
        self._tokens = Counter("grinqh_generated_tokens", "Generated tokens", registry=registry)
        self._weight_bytes = Counter(
            "grinqh_weight_bytes_read",
            "Bytes of weights that decode steps read, as if each answer were alone",
            registry=registry,
        )
        self._drafted = Counter(
            "grinqh_drafted_tokens", "Drafts that speculation verified", registry=registry
        )
        self._accepted = Counter(
            "grinqh_accepted_tokens", "Drafts that speculation accepted", registry=registry
        )
        self._first = Histogram(
            "grinqh_time_to_first_event_seconds",
            "Time from a request to the first event of an answer",
            buckets=_SLOW,
            registry=registry,
        )
        self._between = Histogram(
            "grinqh_time_between_events_seconds",
            "Time between two events of an answer",
            buckets=_FAST,
            registry=registry,
        )
        self._duration = Histogram(
            "grinqh_answer_seconds",
            "Time from a request to the end of an answer",
            buckets=_SLOW,
            registry=registry,
        )
        self._bits = Histogram(
            "grinqh_realised_bits", "Mean bits read per weight in an answer", buckets=_BITS, registry=registry
        )
        gauges = {
            "grinqh_answers_waiting": ("Answers that wait for a slot", lambda now: now.waiting),
            "grinqh_answers_reading": ("Answers whose prompt is being read", lambda now: now.reading),
            "grinqh_answers_decoding": ("Answers that are being decoded", lambda now: now.decoding),
            "grinqh_slots": ("Answers that can be decoded at once", lambda now: now.slots),
            "grinqh_cache_pages": ("Pages of the cache", lambda now: now.pages),
            "grinqh_cache_pages_in_use": ("Pages of running answers", lambda now: now.pages_in_use),
            "grinqh_cache_pages_kept": ("Pages of kept prefixes", lambda now: now.pages_kept),
        }
        for name, (purpose, read) in gauges.items():
            self._gauge(name, purpose, engine, read)

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)

    def clock(self) -> "Clock":
        """Starts the clock of an answer."""
        return Clock(self._first, self._between, self._duration)

    def count(self, answer: Answer, statistics: Statistics | None, outcome: str) -> None:
        """Counts an answer that has ended.

        Args:
          answer: The answer.
          statistics: Its figures; None if it has none.
          outcome: Value of the label ``outcome``.
        """
        self.answers.labels(outcome).inc()
        self._prompt_tokens.inc(answer.prompt_tokens)
        self._reused_tokens.inc(answer.reused_tokens or 0)
        self._tokens.inc(len(answer.tokens))
        if answer.speculation is not None:
            self._drafted.inc(answer.speculation.drafted)
            self._accepted.inc(answer.speculation.accepted)
        if statistics is not None:
            if statistics.realised_bits is not None:
                self._bits.observe(statistics.realised_bits)
            steps = max(len(answer.tokens) - 1, 0)
            self._weight_bytes.inc((statistics.bytes_per_token or 0) * steps)

    def _gauge(self, name: str, purpose: str, engine: Engine, read: Callable[[EngineStats], float]) -> None:
        Gauge(name, purpose, registry=self.registry).set_function(lambda: read(engine.stats()))


class Clock:
    """Measures the events of one answer."""

    def __init__(self, first: Histogram, between: Histogram, duration: Histogram):
        self._started = time.perf_counter()
        self._last: float | None = None
        self._first, self._between, self._duration = first, between, duration

    def event(self) -> None:
        """Records an event."""
        now = time.perf_counter()
        if self._last is None:
            self._first.observe(now - self._started)
        else:
            self._between.observe(now - self._last)
        self._last = now

    def end(self) -> None:
        """Records the end of the answer."""
        self._duration.observe(time.perf_counter() - self._started)
