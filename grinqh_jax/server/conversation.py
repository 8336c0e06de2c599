"""Turns the messages of a request into a prompt, and says how the model's answers are to be parsed."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from grinqh_jax.errors import UsageError
from grinqh_jax.server.answer_parser import CALL, THINK, AnswerParser, ToolFormat
from grinqh_jax.server.answer_rules import Reasoning
from grinqh_jax.server.errors import APIError
from grinqh_jax.server.schema import AssistantMessage, Content, Message, TemplateArguments, Tool, ToolMessage
from grinqh_jax.server.tool_choice import Calls
from grinqh_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation as tokens.

    Attributes:
      tokens: Tokens up to the beginning of the answer.
      reasoning: Whether the answer may begin with reasoning.
    """

    tokens: list[int]
    reasoning: Reasoning


class Conversations:
    """The chat format of a model.

    Attributes:
      tools: Format of the model's calls; None if its chat template has no tools.
      reasons: Whether the chat template knows reasoning.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template() if tokenizer.has_chat_template else None
        source = self._source or ""
        self.reasons = THINK[1] in source
        self.tools: ToolFormat | None = None
        if _reads(source, "tools"):
            if CALL[0] in source:
                self.tools = "tags"
            elif '"parameters"' in source and "ipython" in source:
                self.tools = "json"

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        arguments: TemplateArguments | None,
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Returns a conversation as tokens.

        Raises:
          APIError: The model has no chat template, or the template does not support the request.
        """
        if self._source is None:
            raise APIError(
                400,
                "the model has no chat template and cannot chat; use /v1/completions, or serve a chat model",
                param="messages",
                code="no_chat_template",
            )
        if tools and self.tools is None:
            raise APIError(
                400,
                "tools are not supported: the model's chat template has none of a known format (Qwen2.5, "
                "Qwen3, Llama 3); leave out",
                param="tools",
                code="unsupported_parameter",
            )
        variables = {} if arguments is None else arguments.model_dump(exclude_none=True)
        if unknown := [name for name in variables if not _reads(self._source, name)]:
            raise APIError(
                400,
                f"chat_template_kwargs: the model's chat template does not read {', '.join(unknown)}",
                param="chat_template_kwargs",
            )
        try:
            text = self._tokenizer.chat_text(
                [_message(each) for each in messages],
                tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
                variables=variables,
                add_generation_prompt=add_generation_prompt,
            )
            tokens = self._tokenizer.encode(text, special_tokens=False)
        except UsageError as error:
            reason = str(error).rpartition("the chat template fails: ")[2]  # without the model's directory
            raise APIError(400, f"messages: {reason}", param="messages") from None
        return Prompt(tokens, self._reasoning(text.rstrip()))

    def parser(self, prompt: Prompt, calls: Calls) -> AnswerParser:
        """Returns a parser for an answer.

        Args:
          prompt: Prompt of the answer.
          calls: Calls that the answer may have.
        """
        return AnswerParser(
            reasons=self.reasons,
            reasoning=prompt.reasoning == "begun",
            tools=self.tools if calls.names else None,
            names=calls.names,
            exact=calls.exact,
        )

    def _reasoning(self, prompt: str) -> Reasoning:
        """Returns whether the answer to a prompt may reason, which the end of the prompt decides."""
        if not self.reasons or prompt.endswith(THINK[1]):
            return "none"
        return "begun" if prompt.endswith(THINK[0]) else "possible"


def _message(message: Message) -> dict[str, Any]:
    """Returns a message as chat templates read it: content as text, arguments as an object."""
    if isinstance(message, AssistantMessage):
        fields: dict[str, Any] = {"role": "assistant", "content": _text(message.content)}
        if message.reasoning_content is not None:
            fields["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
    else:
        role = "system" if message.role == "developer" else message.role
        fields = {"role": role, "content": _text(message.content)}
        if isinstance(message, ToolMessage):
            fields["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        fields["name"] = message.name
    return fields


def _text(content: Content | None) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content or ())


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise APIError(400, "messages: the arguments of a tool call are not a JSON object", param="messages")
    return value


def _reads(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None
