"""Which functions an answer may call, or must call, and the rules that this sets for the answer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from grinqh_jax.server.answer_parser import ToolFormat
from grinqh_jax.server.answer_rules import CallableFunction, Reasoning, Rules, call_rules, json_rules
from grinqh_jax.server.errors import APIError
from grinqh_jax.server.schema import AllowedToolChoice, ChatCompletion, NamedTool, Tool

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""Schema of a function without the field ``parameters``, as in OpenAI's protocol."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls that an answer may have.

    Attributes:
      tools: Functions that the prompt lists; None for none.
      allowed: Indices of the functions that the answer may call.
      forced: Whether the answer consists of calls.
      parallel: Whether it may have several.
    """

    tools: Sequence[Tool] | None
    allowed: tuple[int, ...]
    forced: bool
    parallel: bool

    @classmethod
    def of(cls, body: ChatCompletion) -> "Calls":
        """Returns the calls that a request allows.

        Raises:
          APIError: The choice needs tools, or names a function that is not among them.
        """
        tools, choice, parallel = body.tools or (), body.tool_choice, body.parallel_tool_calls is not False
        if choice == "none" or (not tools and choice in (None, "auto")):
            return cls(None, (), False, parallel)
        if not tools:
            raise APIError(400, "tool_choice: only with tools", param="tool_choice")
        names = [tool.function.name for tool in tools]
        wanted, forced = names, choice == "required"
        if isinstance(choice, NamedTool):
            wanted, forced = [choice.function.name], True
        elif isinstance(choice, AllowedToolChoice):
            wanted = [tool.function.name for tool in choice.allowed_tools.tools]
            forced = choice.allowed_tools.mode == "required"
        if unknown := [name for name in wanted if name not in names]:
            raise APIError(
                400, f"tool_choice: {unknown[0]!r:.80} is not among the tools", param="tool_choice"
            )
        allowed = tuple(i for i, name in enumerate(names) if name in wanted)
        return cls(tools, allowed, forced, parallel)

    @property
    def names(self) -> list[str]:
        """Names of the functions that the answer may call."""
        return [tool.function.name for _, tool in self._allowed()]

    @property
    def exact(self) -> bool:
        """Whether the answer must fit rules because of its calls."""
        strict = any(tool.function.strict for _, tool in self._allowed())
        return bool(self.allowed) and (self.forced or strict or not self.parallel)

    def rules(
        self, form: ToolFormat | None, schema: Mapping[str, Any] | None, reasoning: Reasoning
    ) -> Rules | None:
        """Returns the rules of the answer; None for any text.

        Args:
          form: Form of the model's calls.
          schema: JSON schema of an answer without calls; None for any text.
          reasoning: Whether the answer may begin with reasoning.

        Raises:
          APIError: The schema of a function is not one of objects.
        """
        if not self.exact and (schema is None or not self.allowed):
            return None if schema is None else json_rules(schema, reasoning)
        assert form is not None, "the prompt has tools"
        return call_rules(
            [self._callable(i, tool) for i, tool in self._allowed()],
            form,
            forced=self.forced,
            parallel=self.parallel,
            schema=schema,
            reasoning=reasoning,
        )

    def _allowed(self) -> list[tuple[int, Tool]]:
        return [(i, self.tools[i]) for i in self.allowed] if self.tools else []

    def _callable(self, index: int, tool: Tool) -> CallableFunction:
        function, field = tool.function, f"tools.{index}.function.parameters"
        if not (self.forced or function.strict):
            return CallableFunction(function.name, ANY_OBJECT, field)
        schema = NO_ARGUMENTS if function.parameters is None else function.parameters
        if schema.get("type", "object") != "object":
            raise APIError(
                400,
                f"{field}: the type is {schema['type']!r:.40}, and arguments are an object",
                param=field,
                code="invalid_function_parameters",
            )
        return CallableFunction(function.name, {**schema, "type": "object"}, field)
