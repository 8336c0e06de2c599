"""The model that a server serves, and answers to requests for it."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import starlette.requests

from grinqh_jax.decoding.bits import FULL, Bits
from grinqh_jax.decoding.dial import layer_shares
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.request import Request
from grinqh_jax.errors import UsageError
from grinqh_jax.server.answer_rules import Rules
from grinqh_jax.server.choice import Choice
from grinqh_jax.server.errors import APIError
from grinqh_jax.server.limits import Admission, Limits
from grinqh_jax.server.metrics import Metrics
from grinqh_jax.server.schema import MAX_BITS, Generation
from grinqh_jax.serving.engine import Engine
from grinqh_jax.serving.grammar import Grammar

Result = TypeVar("Result")

LARGE_BODY = 256 << 10
"""Bytes of a request from which on its text shares a thread with other such texts."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields that a request to the server and a ``Request`` have in common."""


@dataclasses.dataclass
class _Running:
    """The answers to a request, and the bits that they read now."""

    choices: list[Choice]
    bits: Bits


class Service:
    """One model on one engine.

    Attributes:
      name: Name of the model in requests.
      generator: Model, tokenizer and defaults.
      engine: Engine that decodes.
      limits: Limits of the server.
      metrics: Metrics of the server.
      admission: Counter of unfinished answers.
      prompt_logprobs: Whether the engine computes log-probabilities of prompts.
      context: Most tokens of a prompt and its answer together.
    """

    def __init__(self, name: str, generator: Generator, engine: Engine, limits: Limits):
        self.name = name
        self.generator = generator
        self.engine = engine
        self.limits = limits
        self.prompt_logprobs = engine.shape.prompt_logprobs
        self.metrics = Metrics(engine)
        self.context = engine.shape.max_context
        self._weights = layer_shares(generator.model.config)
        self.admission = Admission(engine.shape.slots, limits.queue)
        self._running: dict[str, _Running] = {}  # unfinished requests by id
        self._clocks: set[asyncio.Timeout] = set()  # of unfinished requests
        self._cut = False
        self._large_texts = concurrent.futures.ThreadPoolExecutor(1)

    def cut(self) -> None:
        """Ends all unfinished requests, because the server ends. Only the event loop's thread calls it."""
        self._cut = True
        for clock in self._clocks:
            if not clock.expired():
                clock.reschedule(0)

    def bits(self, model: str | None, field: Bits | None = None) -> Bits | None:
        """Returns the bits of a request: its field, or a suffix ``@BITS`` of the model's name.

        Args:
          model: Name of the model; None for the only one.
          field: Value of the field ``bits``.

        Raises:
          APIError: The model does not exist, the bits are out of range, or field and suffix disagree.
        """
        name, suffix = self.name if model is None else model, None
        if name != self.name:
            name, _, suffix = name.rpartition("@")
        if name != self.name:
            raise APIError(
                404,
                f"the model {model!r:.100} does not exist; this server has {self.name}",
                param="model",
                code="model_not_found",
            )
        wanted = field
        if suffix is not None:
            wanted = _suffix_bits(suffix)
            if field is not None and field != wanted:
                raise APIError(
                    400, f"bits: the model's name asks for {suffix} and the field for {field}", param="bits"
                )
        try:
            self.generator.bits(wanted)
        except UsageError as error:
            raise APIError(400, str(error), param="bits") from None
        return wanted

    def turn(self, id: str, bits: Bits) -> tuple[Bits, Bits]:
        """Changes the bits of all unfinished answers to a request, from their next decode chunks on.

        Whoever knows an id may turn its answers. Ids have 122 random bits of the operating system (UUID 4),
        so only those know it who have seen the events of the answer.

        Args:
          id: Id of the request, which its events have.
          bits: Wanted mean bits per weight.

        Returns:
          Bits before and from now on.

        Raises:
          APIError: 404 if no request with this id runs, 400 if the model does not support the bits.
        """
        self.bits(None, bits)
        running = self._running.get(id)
        if running is None or all(choice.finish_reason for choice in running.choices):
            raise APIError(
                404,
                f"no answer with the id {id!r:.100} runs; it has ended, or another server has it",
                code="answer_not_found",
            )
        for choice in running.choices:
            self.engine.turn(choice.answer, bits)
        before, running.bits = running.bits, bits
        return before, bits

    async def in_thread(
        self, request: starlette.requests.Request, work: Callable[..., Result], *arguments: Any
    ) -> Result:
        """Returns the result of work on the text of a request, which runs in a thread.

        Large requests share one thread. Megabytes take seconds to tokenize, and a few such requests would
        occupy all threads.
        """
        size = int(request.headers.get("content-length", LARGE_BODY))
        executor = self._large_texts if size >= LARGE_BODY else None
        return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)

    async def grammar(self, rules: Rules | None) -> Grammar | None:
        """Returns the grammar of rules; None for None.

        Raises:
          APIError: A schema is invalid or not supported.
        """
        return None if rules is None else await asyncio.to_thread(self._grammar, rules)

    def _grammar(self, rules: Rules) -> Grammar:
        try:
            return self.engine.grammar_of_rules(rules.text, rules.schemas)
        except UsageError as error:
            reason, (field, *others) = error, rules.fields.values()
            for name in rules.schemas if others else ():
                try:
                    self.engine.grammar(rules.schemas[name])
                except UsageError as alone:
                    reason, field = alone, rules.fields[name]
                    break
            code = None if field == "response_format" else "invalid_function_parameters"
            raise APIError(400, f"{field}: {reason}", param=field, code=code) from None

    def requests(self, body: Generation, bits: Bits | None, max_tokens: int) -> list[Request]:
        """Returns a request to the engine for each of the ``n`` choices; they differ in the seed.

        Raises:
          APIError: A value is out of range.
        """
        fields: dict[str, Any] = {name: getattr(body, name) for name in (*SAMPLING, *PENALTIES)}
        if body.logit_bias:
            fields["logit_bias"] = self._logit_bias(body.logit_bias)
        if body.ignore_eos:
            fields["stop_tokens"] = ()
        seed = secrets.randbits(32) if body.seed is None else body.seed
        try:
            request = Request(bits=bits, max_tokens=max_tokens, stop=body.stop or (), seed=seed, **fields)
        except UsageError as error:
            raise APIError(400, str(error)) from None
        return [dataclasses.replace(request, seed=seed + choice) for choice in range(body.n or 1)]

    def max_tokens(
        self,
        wanted: int | None,
        prompts: Sequence[Sequence[int]],
        default: int | None,
        field: str = "max_tokens",
    ) -> int:
        """Returns the most tokens of each answer.

        Args:
          wanted: Value of the request's field.
          prompts: Tokens of the prompts.
          default: Value if the request has none; None for the rest of the context.
          field: Name of the field.

        Raises:
          APIError: A prompt is empty or does not fit the context with its answer.
        """
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise APIError(400, "the prompt has no tokens; send at least one", param="prompt")
        room = self.context - longest
        if room < 1 or (wanted is not None and wanted > room):
            answer = "the answer" if wanted is None else f"an answer of {wanted}"
            raise APIError(
                400,
                f"the prompt has {longest} tokens and the context holds {self.context}, {answer} included; "
                "shorten the prompt or the answer",
                param=field if room >= 1 else None,
                code="context_length_exceeded",
            )
        most = self.limits.max_tokens
        if wanted is not None and most is not None and wanted > most:
            raise APIError(
                400, f"{field} is {wanted} and this server's limit is {most}; ask for fewer", param=field
            )
        return min(wanted or default or room, room, most or room)

    @contextlib.asynccontextmanager
    async def choices(
        self,
        id: str,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        top_logprobs: int | None,
        *,
        prompt_logprobs: bool = False,
        grammar: Grammar | None = None,
    ) -> AsyncIterator[list[Choice]]:
        """Starts all requests on each prompt; those that are unfinished after the block are cancelled.

        Args:
          id: Id of the request, by which its answers can be turned.
          prompts: Tokens of each prompt.
          requests: Requests on each prompt, with the same bits.
          top_logprobs, prompt_logprobs, grammar: As for ``Engine.submit``.

        Raises:
          APIError: There is no room in the queue, a request does not fit, the block takes too long, or the
            server ends.
          EngineError: The engine has ended.
        """
        started: list[Choice] = []
        otherwise = "failed"
        with self.admission.hold(len(prompts) * len(requests)):
            try:
                async with self._clock():
                    for prompt in prompts:
                        for request in requests:
                            answer = self.engine.submit(
                                prompt,
                                request,
                                top_logprobs=top_logprobs,
                                prompt_logprobs=prompt_logprobs,
                                grammar=grammar,
                            )
                            started.append(Choice(len(started), answer, self.metrics.clock(), self._weights))
                    self._running[id] = _Running(started, self._setting(requests[0].bits))
                    yield started
            except TimeoutError:
                otherwise = "timeout"
                raise self._late() from None
            except asyncio.CancelledError:
                otherwise = "disconnected"
                raise
            finally:
                self._running.pop(id, None)
                for choice in started:
                    self.engine.cancel(choice.answer)
                    outcome = choice.answer.finish_reason if choice.statistics else None
                    self.metrics.count(choice.answer, choice.statistics, outcome or otherwise)

    @contextlib.asynccontextmanager
    async def _clock(self) -> AsyncIterator[None]:
        """Raises TimeoutError in a block that takes too long, or when the server ends."""
        async with asyncio.timeout(0 if self._cut else self.limits.request_seconds) as clock:
            self._clocks.add(clock)
            try:
                yield
            finally:
                self._clocks.remove(clock)

    def _setting(self, bits: Bits | None) -> Bits:
        """Returns the bits that a request reads if it asks for some or for none."""
        default = self.generator.bits(None)
        return bits if bits is not None else FULL if default is None else default

    def _late(self) -> APIError:
        if self._cut:
            again = {"Retry-After": "5"}
            return APIError(503, "the server is shutting down; try again later", code="ending", headers=again)
        seconds = f"{self.limits.request_seconds:g}"
        return APIError(
            504, f"the answer did not end within {seconds} s; ask for fewer tokens", code="timeout"
        )

    def _logit_bias(self, bias: Any) -> dict[int, float]:
        if wrong := [key for key in bias if not (key.isascii() and key.isdecimal() and len(key) < 10)]:
            raise APIError(400, f"logit_bias: {wrong[0]!r:.40} is not a token id", param="logit_bias")
        tokens = {int(key): value for key, value in bias.items()}
        try:
            self.generator.model.config.check_tokens(tokens)
        except UsageError as error:
            raise APIError(400, f"logit_bias: {error}", param="logit_bias") from None
        return tokens


def _suffix_bits(suffix: str) -> Bits:
    if suffix == FULL:
        return FULL
    value = float(suffix) if re.fullmatch(r"\d{1,2}(\.\d{1,16})?", suffix, re.ASCII) else 0.0
    if not 0 < value <= MAX_BITS:
        raise APIError(
            400, f"model: {suffix!r:.40} is neither a number of bits up to {MAX_BITS} nor full", param="model"
        )
    return value
