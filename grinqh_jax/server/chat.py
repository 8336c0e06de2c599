"""``/v1/chat/completions``."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grinqh_jax.server.answer_parser import Delta, ToolCall
from grinqh_jax.server.body import parse
from grinqh_jax.server.choice import Choice, together, usage
from grinqh_jax.server.conversation import Conversations, Prompt
from grinqh_jax.server.logprobs import chat_logprobs
from grinqh_jax.server.schema import ChatCompletion, StreamOptions, answer_schema
from grinqh_jax.server.service import Service
from grinqh_jax.server.streaming import Emit, EventStream, while_connected
from grinqh_jax.server.tool_choice import Calls
from grinqh_jax.serving.answer import TokenLogprob
from grinqh_jax.serving.grammar import Grammar


class Chat:
    """Handles chats."""

    def __init__(self, service: Service, conversations: Conversations):
        self._service = service
        self._conversations = conversations

    async def create(self, request: Request) -> Response | EventStream:
        """Answers a chat, as one object or as events."""
        service = self._service
        body = await parse(request, ChatCompletion, service.limits)
        bits = service.bits(body.model, body.bits)
        calls = Calls.of(body)
        prompt = await service.in_thread(
            request, self._conversations.prompt, body.messages, calls.tools, body.chat_template_kwargs
        )
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        limit = service.max_tokens(getattr(body, field), [prompt.tokens], default=None, field=field)
        schema = answer_schema(body.response_format)
        rules = calls.rules(self._conversations.tools, schema, prompt.reasoning)
        grammar = await service.grammar(rules)
        requests = service.requests(body, bits, limit)
        work = _Work(service, self._conversations, body, prompt, calls, requests, grammar)
        if body.stream:
            return EventStream(work.stream)
        return JSONResponse(await while_connected(request.receive, work.complete()))


class _Work:
    """One request."""

    def __init__(
        self,
        service: Service,
        conversations: Conversations,
        body: ChatCompletion,
        prompt: Prompt,
        calls: Calls,
        requests: Sequence[Any],
        grammar: Grammar | None,
    ):
        self._service = service
        self._conversations = conversations
        self._body = body
        self._prompt = prompt
        self._requests = requests
        self._grammar = grammar
        self._calls = calls
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or service.name,
        }

    def _choices(self):
        top = (self._body.top_logprobs or 0) if self._body.logprobs else None
        return self._service.choices(
            self._head["id"], [self._prompt.tokens], self._requests, top, grammar=self._grammar
        )

    async def complete(self) -> dict[str, Any]:
        """Returns the whole response."""
        messages: dict[int, dict[str, Any]] = {}

        async def consume(choice: Choice) -> None:
            parser = self._conversations.parser(self._prompt, self._calls)
            deltas: list[Delta] = []
            logprobs: list[TokenLogprob] = []
            async for piece in choice.pieces():
                deltas += parser.push(piece.text)
                logprobs += piece.logprobs or ()
            deltas += parser.flush()
            messages[choice.index] = {
                "index": choice.index,
                "message": _message(deltas),
                "logprobs": self._logprobs(logprobs),
                "finish_reason": _finish_reason(choice, parser.calls),
            }

        async with self._choices() as choices:
            await together(choices, consume)
            return self._head | {
                "object": "chat.completion",
                "choices": [messages[choice.index] for choice in choices],
                "usage": usage(choices, len(self._prompt.tokens)),
            }

    async def stream(self, emit: Emit) -> None:
        """Sends the response as events."""
        options = self._body.stream_options or StreamOptions()
        layers = bool(options.include_layer_bits)
        with_usage = bool(options.include_usage) or layers

        async def send(choices: Sequence[Choice], choice: dict[str, Any] | None) -> None:
            event = self._head | {
                "object": "chat.completion.chunk",
                "choices": [] if choice is None else [choice],
            }
            if choice is None or options.continuous_usage_stats:
                last = choice is None
                event["usage"] = usage(choices, len(self._prompt.tokens), layers=layers and last)
            elif with_usage:
                event["usage"] = None
            await emit(event)

        async with self._choices() as choices:

            async def consume(choice: Choice) -> None:
                parser = self._conversations.parser(self._prompt, self._calls)
                started = False

                async def say(
                    delta: dict[str, Any], logprobs: list[TokenLogprob] | None, reason: str | None = None
                ) -> None:
                    nonlocal started
                    first = {} if started else {"role": "assistant", "content": ""}
                    started = True
                    await send(
                        choices,
                        {
                            "index": choice.index,
                            "delta": first | delta,
                            "logprobs": self._logprobs(logprobs or []),
                            "finish_reason": reason,
                        },
                    )

                async for piece in choice.pieces():
                    logprobs = piece.logprobs
                    for delta in _deltas(parser.push(piece.text)):
                        await say(delta, logprobs)
                        logprobs = None  # the first event of a piece carries those of all its tokens
                    if logprobs or not started:
                        await say({}, logprobs)
                for delta in _deltas(parser.flush()):
                    await say(delta, None)
                await say({}, None, _finish_reason(choice, parser.calls))

            await together(choices, consume)
            if with_usage:
                await send(choices, None)

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs or not tokens:
            return None
        return chat_logprobs(tokens, self._service.generator.tokenizer)


def _message(deltas: Sequence[Delta]) -> dict[str, Any]:
    """Returns the message of a whole answer."""
    text = {
        kind: "".join(delta.text for delta in deltas if delta.kind == kind)
        for kind in ("content", "reasoning")
    }
    calls = [_call(delta.call) for delta in deltas if delta.call is not None]
    for delta in deltas:
        if delta.kind == "arguments":
            calls[delta.index]["function"]["arguments"] += delta.text
    message: dict[str, Any] = {"role": "assistant", "content": text["content"]}
    if text["reasoning"]:
        message["reasoning_content"] = text["reasoning"]
    if calls:
        message["content"] = text["content"].strip() or None
        message["tool_calls"] = calls
    return message


def _deltas(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """Returns the field ``delta`` of an event for each delta."""
    return [_delta(each) for each in deltas]


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    call = {"function": {"arguments": delta.text}} if delta.call is None else _call(delta.call)
    return {"tool_calls": [{"index": delta.index} | call]}


def _call(call: ToolCall) -> dict[str, Any]:
    fields = dataclasses.asdict(call)
    return {"id": fields.pop("id"), "type": "function", "function": fields}


def _finish_reason(choice: Choice, calls: int) -> str | None:
    return "tool_calls" if calls and choice.finish_reason == "stop" else choice.finish_reason
