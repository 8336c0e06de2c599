"""``/v1/completions``."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grinqh_jax.errors import UsageError
from grinqh_jax.server.answer_rules import json_rules
from grinqh_jax.server.body import parse
from grinqh_jax.server.choice import Choice, together, usage
from grinqh_jax.server.errors import APIError
from grinqh_jax.server.logprobs import Logprob, TextOffsets, completion_logprobs
from grinqh_jax.server.schema import Completion, StreamOptions, answer_schema
from grinqh_jax.server.service import Service
from grinqh_jax.server.streaming import Emit, EventStream, while_connected
from grinqh_jax.serving.grammar import Grammar

DEFAULT_TOKENS = 16
"""Most tokens of an answer if the request does not say, as in OpenAI's protocol."""

MOST_PROMPTS = 128


class Completions:
    """Handles text completions."""

    def __init__(self, service: Service):
        self._service = service

    async def create(self, request: Request) -> Response | EventStream:
        """Continues one or several prompts, as one object or as events."""
        service = self._service
        body = await parse(request, Completion, service.limits)
        if body.echo and body.logprobs is not None and not service.prompt_logprobs:
            raise APIError(
                400,
                "echo with logprobs needs log-probabilities of prompts; leave one out, or start the server "
                "with --prompt-logprobs",
                param="echo",
                code="unsupported_parameter",
            )
        bits = service.bits(body.model, body.bits)
        prompts = await service.in_thread(request, self._prompts, body.prompt)
        # The engine generates at least one token.
        wanted = 1 if body.max_tokens == 0 else body.max_tokens
        limit = service.max_tokens(wanted, prompts, default=DEFAULT_TOKENS)
        schema = answer_schema(body.response_format)
        grammar = await service.grammar(None if schema is None else json_rules(schema))
        work = _Work(service, body, prompts, service.requests(body, bits, limit), grammar)
        if body.stream:
            return EventStream(work.stream)
        return JSONResponse(await while_connected(request.receive, work.complete()))

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Returns the tokens of each prompt.

        Raises:
          APIError: There is no prompt or there are too many, or a token does not exist.
        """
        one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        prompts = [prompt] if one else prompt
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise APIError(
                400, f"prompt: there are {len(prompts)} prompts; send 1 to {MOST_PROMPTS}", param="prompt"
            )
        try:
            return [self._service.generator.prompt_tokens(each) for each in prompts]
        except UsageError as error:
            raise APIError(400, f"prompt: {error}", param="prompt") from None


class _Work:
    """One request."""

    def __init__(
        self,
        service: Service,
        body: Completion,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Any],
        grammar: Grammar | None,
    ):
        self._service = service
        self._body = body
        self._prompts = prompts
        self._requests = requests
        self._grammar = grammar
        self._prompt_tokens = sum(map(len, prompts))
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or service.name,
        }

    def _choices(self):
        wanted = self._body.logprobs
        return self._service.choices(
            self._head["id"],
            self._prompts,
            self._requests,
            wanted,
            prompt_logprobs=bool(self._body.echo) and wanted is not None,
            grammar=self._grammar,
        )

    def _prompt(self, choice: Choice) -> list[int]:
        return list(self._prompts[choice.index // len(self._requests)])

    def _echo(self, choice: Choice) -> str:
        """Returns the text before the answer: the prompt if the request wants it back."""
        if not self._body.echo:
            return ""
        prompt: Any = self._body.prompt
        if isinstance(prompt, str):
            return prompt
        one = prompt[choice.index // len(self._requests)]
        return one if isinstance(one, str) else self._service.generator.tokenizer.decode(self._prompt(choice))

    def _echoed_logprobs(self, choice: Choice) -> list[Logprob]:
        """Returns the log-probabilities before those of the answer; the first token of a prompt has none."""
        if not self._body.echo or self._body.logprobs is None:
            return []
        return [(self._prompt(choice)[0], None, None), *(choice.answer.prompt_logprobs or ())]

    async def _pieces(self, choice: Choice) -> AsyncIterator[tuple[str, list[Logprob]]]:
        """Yields text and log-probabilities as they arrive, the echo first."""
        text, begun = self._echo(choice), False
        logprobs: list[Logprob] = []
        async for piece in choice.pieces():
            if not begun:  # The engine has read the prompt.
                logprobs, begun = self._echoed_logprobs(choice), True
            if self._body.max_tokens != 0:
                text += piece.text
                logprobs += piece.logprobs or ()
            if text or logprobs:
                yield text, logprobs
            text, logprobs = "", []

    async def complete(self) -> dict[str, Any]:
        """Returns the whole response."""
        results: dict[int, dict[str, Any]] = {}

        async def consume(choice: Choice) -> None:
            text = ""
            logprobs: list[Logprob] = []
            async for more, more_logprobs in self._pieces(choice):
                text += more
                logprobs += more_logprobs
            results[choice.index] = self._choice(choice, text, logprobs, self._offsets(choice))

        async with self._choices() as choices:
            await together(choices, consume)
            return self._head | {
                "choices": [results[choice.index] for choice in choices],
                "usage": self._usage(choices),
            }

    async def stream(self, emit: Emit) -> None:
        """Sends the response as events."""
        options = self._body.stream_options or StreamOptions()
        layers = bool(options.include_layer_bits)
        with_usage = bool(options.include_usage) or layers

        async with self._choices() as choices:

            async def send(choice: dict[str, Any] | None) -> None:
                event = self._head | {"choices": [] if choice is None else [choice]}
                if choice is None or options.continuous_usage_stats:
                    event["usage"] = self._usage(choices, layers=layers and choice is None)
                elif with_usage:
                    event["usage"] = None
                await emit(event)

            async def consume(choice: Choice) -> None:
                offsets = self._offsets(choice)
                async for text, logprobs in self._pieces(choice):
                    event = self._choice(choice, text, logprobs, offsets)
                    await send(event | {"finish_reason": None})
                await send(self._choice(choice, "", [], offsets))

            await together(choices, consume)
            if with_usage:
                await send(None)

    def _usage(self, choices: Sequence[Choice], layers: bool = False) -> dict[str, Any]:
        answers = self._body.max_tokens != 0
        return usage(choices, self._prompt_tokens, prompts=len(self._prompts), answers=answers, layers=layers)

    def _offsets(self, choice: Choice) -> TextOffsets:
        return TextOffsets(self._service.generator.tokenizer, self._echo(choice))

    def _choice(
        self, choice: Choice, text: str, logprobs: Sequence[Logprob], offsets: TextOffsets
    ) -> dict[str, Any]:
        wanted = self._body.logprobs
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None
            if wanted is None or not logprobs
            else completion_logprobs(logprobs, self._service.generator.tokenizer, offsets, wanted > 0),
            "finish_reason": choice.finish_reason,
        }
