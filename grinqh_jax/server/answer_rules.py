"""Rules that answers fit: JSON, calls of functions in the model's form, and reasoning before them.

The rules are in llguidance's dialect of Lark. Rules of calls of Llama 3 have the same literals as those of a
JSON schema, because llguidance's lexer (1.9.1) cannot follow two literals of which one begins with the other.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from grinqh_jax.server.answer_parser import CALL, THINK, ToolFormat, call_head

Reasoning = Literal["none", "possible", "begun"]
"""Whether an answer may begin with reasoning, or begins within it because the prompt has the opening tag."""

_REASONING: dict[Reasoning, str] = {"none": "", "possible": "reasoned? ", "begun": "reasoned "}

_COMMON = rf"""
ANY: /(.|\n)*/
TEXT: ANY & ~/{THINK[0]}(.|\n)*/
NO_OBJECT: /([^{{\s](.|\n)*)?/
text: TEXT
reasoned: thought "\n"? "\n"?
"""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Rules of an answer.

    Attributes:
      text: Rules in Lark. The rule ``start`` is the whole answer.
      schemas: JSON schema of each rule that ``text`` uses and does not define.
      fields: Field of the request that each schema comes from.
    """

    text: str
    schemas: dict[str, Mapping[str, Any]]
    fields: dict[str, str]


@dataclasses.dataclass(frozen=True)
class CallableFunction:
    """A function that an answer may call.

    Attributes:
      name: Name of the function.
      schema: JSON schema of its arguments.
      field: Field of the request that the schema comes from.
    """

    name: str
    schema: Mapping[str, Any]
    field: str


def json_rules(schema: Mapping[str, Any], reasoning: Reasoning = "none") -> Rules:
    """Returns the rules of JSON that fits a schema, after reasoning if there may be any."""
    start = f"start: {_REASONING[reasoning]}answer"
    return Rules(start + _thought(reasoning), {"answer": schema}, {"answer": "response_format"})


def call_rules(
    functions: Sequence[CallableFunction],
    form: ToolFormat,
    *,
    forced: bool,
    parallel: bool,
    schema: Mapping[str, Any] | None,
    reasoning: Reasoning,
) -> Rules:
    """Returns the rules of an answer that calls functions, after reasoning if there may be any.

    Args:
      functions: Functions, at least one.
      form: Form of the model's calls.
      forced: Whether the answer consists of calls. If not, it may also be, or begin with, other text.
      parallel: Whether there may be several calls.
      schema: JSON schema of an answer without calls; None for any text.
      reasoning: Whether the answer may begin with reasoning.
    """
    call, following = "call", '"; " call'
    if form == "tags":
        call, following = f'"{CALL[0]}" call', f'"\\n{CALL[0]}" call'
    calls = f"{call} ({following})*" if parallel else call
    if forced:
        body = calls
    elif schema is not None:
        body = f"{calls} | answer"
    elif form == "json":
        body = f"{calls} | NO_OBJECT"
    elif parallel:
        body = "first call (opening call)* ANY | text"
    else:
        body = "first call | text"
    lines = [f"start: {_REASONING[reasoning]}body", f"body: {body}"]
    lines += [
        f'{name}[lazy]: {before} "{CALL[0]}"' for name, before in (("first", "TEXT"), ("opening", "ANY"))
    ]
    lines += ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        lines.append(f"call_{i}: {_call(function.name, f'arguments_{i}', form)}")
    schemas = {f"arguments_{i}": function.schema for i, function in enumerate(functions)}
    fields = {f"arguments_{i}": function.field for i, function in enumerate(functions)}
    if schema is not None and not forced:
        schemas["answer"], fields["answer"] = schema, "response_format"
    return Rules("\n".join(lines) + _thought(reasoning), schemas, fields)


def _call(name: str, arguments: str, form: ToolFormat) -> str:
    """Returns the right side of the rule of a call; of the form ``tags`` it begins behind the opening tag."""
    if form == "tags":
        return f'{json.dumps(chr(10) + call_head(name, form))} {arguments} "}}\\n{CALL[1]}"'
    pieces = ["{", '"name"', ": ", json.dumps(name), ", ", '"parameters"', ": "]
    return f'{" ".join(map(json.dumps, pieces))} {arguments} "}}"'


def _thought(reasoning: Reasoning) -> str:
    """Returns the rules of reasoning and of texts."""
    opening = f'"{THINK[0]}" ' if reasoning == "possible" else ""
    return f'{_COMMON}thought[lazy]: {opening}ANY "{THINK[1]}"\n'
