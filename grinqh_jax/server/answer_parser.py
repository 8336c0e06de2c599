"""Finds reasoning and tool calls in the text of an answer, piece by piece."""

import dataclasses
import json
import secrets
from collections.abc import Collection
from typing import Any, Literal

THINK = ("<think>", "</think>")
"""Tags around the reasoning of Qwen3 and of other models that reason."""

CALL = ("<tool_call>", "</tool_call>")
"""Tags around each call of Qwen2.5 and Qwen3."""

ToolFormat = Literal["tags", "json"]
"""``tags``: calls between ``CALL``, with ``arguments``. ``json``: an answer of Llama 3 that consists of
calls, with ``parameters``."""


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    Attributes:
      name: Name of the function.
      arguments: Arguments, a JSON object as text.
      id: Identifier that the result of the call refers to.
    """

    name: str
    arguments: str
    id: str


@dataclasses.dataclass(frozen=True)
class Delta:
    """A part of an answer: text or a call.

    Attributes:
      kind: What the text is: ``"arguments"`` is more text of the arguments of a call.
      text: New text; empty for a call.
      call: The call, with the arguments that are known.
      index: Index of the call among those of the answer.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str = ""
    call: ToolCall | None = None
    index: int = 0


class AnswerParser:
    """Splits a text into content, reasoning and calls. Text that may begin a tag is held back.

    Attributes:
      calls: Number of calls so far.
    """

    def __init__(
        self, *, reasons: bool = False, reasoning: bool = False, tools: ToolFormat | None = None,
        names: Collection[str] = (), exact: bool = False,
    ):  # fmt: skip
        """Starts at the beginning of an answer.

        Args:
          reasons: The model may reason between the tags ``THINK``.
          reasoning: The prompt ends with the opening tag, so the answer begins with reasoning.
          tools: Format of calls; None if the model may not call.
          names: Names of the functions. Calls of others are content.
          exact: Calls have the form of ``answer_rules``. Their arguments are then passed on as they arrive.
        """
        self.calls = 0
        self._exact = exact
        self._end = _ObjectEnd()
        self._reasons = reasons or reasoning
        self._tools = tools
        self._names = frozenset(names)
        self._state: Literal["start", "reasoning", "content", "call", "arguments", "close"]
        self._state = "reasoning" if reasoning else "start"
        self._held = ""
        self._strip = reasoning  # blank lines after a tag are not part of what follows

    def push(self, text: str) -> list[Delta]:
        """Adds text; returns the parts that are certain."""
        self._held += text
        deltas: list[Delta] = []
        while self._advance(deltas):
            pass
        return deltas

    def flush(self) -> list[Delta]:
        """Returns the rest, at the end of the answer."""
        deltas: list[Delta] = []
        rest, self._held = self._held, ""
        if self._state in ("arguments", "close"):
            pass  # the arguments so far were passed on
        elif self._state == "call" and self._tools == "tags":
            self._text(deltas, "content", CALL[0] + rest)  # the answer ended within a call
        elif self._state == "call":
            calls = self._json_calls(rest)
            deltas += [self._call(*call) for call in calls]
            if not calls:
                self._text(deltas, "content", rest)
        else:
            self._text(deltas, "reasoning" if self._state == "reasoning" else "content", rest)
        return deltas

    def _advance(self, deltas: list[Delta]) -> bool:
        """Handles the held text up to the next change of state; returns whether there was one."""
        if self._state == "start":
            return self._begin()
        if self._state == "reasoning":
            return self._until(deltas, "reasoning", THINK[1], "content")
        if self._state == "content":
            if self._tools == "tags":
                return self._until(deltas, "content", CALL[0], "call")
            passed, self._held = self._held, ""
            self._text(deltas, "content", passed)
            return False
        if self._state == "arguments":
            return self._arguments(deltas)
        if self._state == "close":
            return self._close_call()
        if self._exact:
            return self._begin_call(deltas)
        return self._tools == "tags" and self._end_call(deltas)

    def _begin(self) -> bool:
        """Decides what the answer begins with, once it is certain."""
        begun = self._held.lstrip()
        if not begun:
            return False
        if self._reasons and begun.startswith(THINK[0]):
            self._held, self._state, self._strip = begun[len(THINK[0]) :], "reasoning", True
        elif self._reasons and THINK[0].startswith(begun):
            return False
        elif self._tools == "json" and begun[0] == "{":
            self._state = "call"
        else:
            self._state = "content"
        return True

    def _until(self, deltas: list[Delta], kind: Any, tag: str, state: Any) -> bool:
        """Passes text on up to a tag, and changes the state behind it."""
        before, found, after = self._held.partition(tag)
        if found:
            self._text(deltas, kind, before.rstrip("\n") if kind == "reasoning" else before)
            self._held, self._state, self._strip = after, state, True
            return True
        keep = next((n for n in range(len(tag) - 1, 0, -1) if self._held.endswith(tag[:n])), 0)
        if kind == "reasoning":  # blank lines before the tag are not part of it
            bare = self._held[: len(self._held) - keep]
            keep += len(bare) - len(bare.rstrip("\n"))
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        self._text(deltas, kind, passed)
        return False

    def _begin_call(self, deltas: list[Delta]) -> bool:
        """Recognizes the beginning of a call of a known form, up to its arguments."""
        assert self._tools is not None, "an answer without tools has no calls"
        begun = self._held.lstrip()
        heads = {call_head(name, self._tools): name for name in self._names}
        for head, name in heads.items():
            if begun.startswith(head):
                deltas.append(self._call(name, ""))
                self._held, self._state, self._end = begun[len(head) :], "arguments", _ObjectEnd()
                return True
        if any(head.startswith(begun) for head in heads):
            return False
        if self._tools == "tags":
            self._text(deltas, "content", CALL[0])
        self._state = "content"  # another JSON text
        return True

    def _arguments(self, deltas: list[Delta]) -> bool:
        """Passes the arguments of a call on."""
        end = self._end.find(self._held)
        text, self._held = self._held[:end], "" if end is None else self._held[end:]
        if text:
            deltas.append(Delta("arguments", text, index=self.calls - 1))
        if end is not None:
            self._state = "close"
        return end is not None

    def _close_call(self) -> bool:
        """Removes the end of a call."""
        if self._tools == "tags":
            _, found, after = self._held.partition(CALL[1])
            if found:
                self._held, self._state, self._strip = after, "content", True
            return bool(found)
        self._held = self._held.lstrip("}; \n")
        if self._held:
            self._state = "call"
        return bool(self._held)

    def _end_call(self, deltas: list[Delta]) -> bool:
        inside, found, after = self._held.partition(CALL[1])
        if not found:
            return False
        call = self._checked(_object(inside))
        if call is None:
            self._text(deltas, "content", CALL[0] + inside + CALL[1])
        else:
            deltas.append(self._call(*call))
        self._held, self._state, self._strip = after, "content", True
        return True

    def _text(self, deltas: list[Delta], kind: Any, text: str) -> None:
        if self._strip:
            text = text.lstrip("\n")
        if text:
            self._strip = False
            deltas.append(Delta(kind, text))

    def _call(self, name: str, arguments: str) -> Delta:
        self.calls += 1
        call = ToolCall(name, arguments, f"call_{secrets.token_hex(12)}")
        return Delta("call", call=call, index=self.calls - 1)

    def _json_calls(self, text: str) -> list[tuple[str, str]]:
        """Returns the calls that a text consists of, separated by ``;``; none if it has anything else."""
        decoder, position, calls = json.JSONDecoder(), 0, []
        text = text.strip()
        while position < len(text):
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError):
                return []
            call = self._checked(value)
            if call is None:
                return []
            calls.append(call)
            while position < len(text) and text[position] in "; \n":
                position += 1
        return calls

    def _checked(self, value: Any) -> tuple[str, str] | None:
        """Returns name and arguments of a call; None if it is none."""
        if not isinstance(value, dict):
            return None
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return name, json.dumps(arguments, ensure_ascii=False)


class _ObjectEnd:
    """Finds the end of a JSON object that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """Reads the next piece; returns how much of it belongs to the object, or None for all and more."""
        for position, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return position + 1
        return None


def call_head(name: str, form: ToolFormat) -> str:
    """Returns the text of a call up to its arguments, within the tags of ``tags``, as models write it."""
    key = "arguments" if form == "tags" else "parameters"
    return f'{{"name": {json.dumps(name)}, "{key}": '


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
