"""Bodies of requests, as pydantic models. A field that is not listed here is refused by name.

Fields that OpenAI's protocol does not have: ``bits``, ``top_k``, ``min_p``, ``repetition_penalty``,
``ignore_eos``, ``chat_template_kwargs``, and ``include_layer_bits`` and ``continuous_usage_stats`` of
``stream_options``.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from grinqh_jax.decoding.request import LOGIT_BIAS_RANGE, RANGES

MAX_BITS = 8
"""Most bits per weight that a checkpoint stores."""

MOST_CHOICES = 128
"""Largest ``n``, as in OpenAI's protocol."""

MOST_TOP_LOGPROBS = 20
"""Most alternatives for which log probabilities are returned, as in OpenAI's protocol."""

MOST_STOP_STRINGS = 16
MOST_TOOLS = 128
MOST_BIASED_TOKENS = 300


def _ranged(kind: Any, name: str) -> Any:
    """Returns the type of an optional number within its range in ``RANGES``."""
    least, most = RANGES[name].least, RANGES[name].most
    return Annotated[kind, Field(ge=kind(least), le=kind(most))] | None


def _refuse_empty(strings: str | list[str] | None) -> str | list[str] | None:
    if strings == "" or (isinstance(strings, list) and "" in strings):
        raise ValueError("a stop string is empty")
    return strings


StopStrings = Annotated[
    str | Annotated[list[str], Field(max_length=MOST_STOP_STRINGS)] | None,
    pydantic.AfterValidator(_refuse_empty),
]
Setting = Annotated[float, Field(gt=0, le=MAX_BITS)] | Literal["full"]
Bits = Setting | None


Bias = Annotated[float, Field(ge=LOGIT_BIAS_RANGE.least, le=LOGIT_BIAS_RANGE.most)]


class Strict(pydantic.BaseModel):
    """Base of all bodies: JSON types as they are, no unknown field, no NaN."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, hide_input_in_errors=True
    )


class StreamOptions(Strict):
    """Whether a last event has the usage (``include_usage``), also with the bits of each layer
    (``include_layer_bits``), and whether all events have the usage (``continuous_usage_stats``)."""

    include_usage: bool | None = None
    include_layer_bits: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A JSON schema. ``strict`` changes nothing: an answer always fits the schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def answer_schema(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """Returns the JSON schema that answers fit; None for any text."""
    if isinstance(response_format, JsonObjectFormat):
        return {"type": "object"}
    if isinstance(response_format, JsonSchemaFormat):
        return response_format.json_schema.json_schema
    return None


class Generation(Strict):
    """Fields that chat and text completions share."""

    model: str | None = None
    bits: Bits = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _ranged(int, "max_tokens") = None  # type: ignore[valid-type]
    temperature: _ranged(float, "temperature") = None  # type: ignore[valid-type]
    top_p: _ranged(float, "top_p") = None  # type: ignore[valid-type]
    top_k: _ranged(int, "top_k") = None  # type: ignore[valid-type]
    min_p: _ranged(float, "min_p") = None  # type: ignore[valid-type]
    repetition_penalty: _ranged(float, "repetition_penalty") = None  # type: ignore[valid-type]
    presence_penalty: _ranged(float, "presence_penalty") = None  # type: ignore[valid-type]
    frequency_penalty: _ranged(float, "frequency_penalty") = None  # type: ignore[valid-type]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopStrings = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    logit_bias: Annotated[Mapping[str, Bias], Field(max_length=MOST_BIASED_TOKENS)] | None = None

    @pydantic.model_validator(mode="after")
    def _stream_options_need_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream")
        return self


class Completion(Generation):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0, le=int(RANGES["max_tokens"].most))] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    @pydantic.model_validator(mode="after")
    def _without_an_answer(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only with echo")
        return self


class TextPart(Strict):
    """Text in the content of a message."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]
Name = Annotated[str, Field(max_length=64)] | None


class SystemMessage(Strict):
    """Instructions. ``developer`` is the newer name of the role."""

    role: Literal["system", "developer"]
    content: Content
    name: Name = None


class UserMessage(Strict):
    """A message of the user."""

    role: Literal["user"]
    content: Content
    name: Name = None


class FunctionCall(Strict):
    """Name and arguments, a JSON object as text.

    OpenAI's client may also send the arguments back as it parsed them. These are not read.
    """

    name: str
    arguments: str
    parsed_arguments: Any = None


class ToolCall(Strict):
    """A call that an earlier answer asked for."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class AssistantMessage(Strict):
    """An earlier answer, as the server returned it.

    OpenAI's client may add what it made of the content, ``parsed``, which is not read.
    """

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None
    parsed: Any = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    name: Name = None


class ToolMessage(Strict):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: Name = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    """A function that the model may call. With ``strict``, all calls fit the schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Name of a function."""

    name: str


class NamedTool(Strict):
    """A function by name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    """Some of the tools; ``required`` if the answer must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS)]


class AllowedToolChoice(Strict):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["auto", "none", "required"]
    | Annotated[NamedTool | AllowedToolChoice, Field(discriminator="type")]
    | None
)


class TemplateArguments(Strict):
    """Variables of the chat template that a request may set."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class ChatCompletion(Generation):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _ranged(int, "max_tokens") = None  # type: ignore[valid-type]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @pydantic.model_validator(mode="after")
    def _fields_agree(self):
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens: max_completion_tokens replaces it; send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        return self


class Turn(Strict):
    """Body of ``/v1/answers/ID/bits``."""

    bits: Setting


class Turned(Strict):
    """Response of ``/v1/answers/ID/bits``: the bits from now on, and those before."""

    id: str
    object: Literal["answer.bits"] = "answer.bits"
    bits: Setting
    previous_bits: Setting


class Tokenize(Strict):
    """Body of ``/v1/tokenize``: a text, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @pydantic.model_validator(mode="after")
    def _one_text(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: send either prompt or messages")
        return self


class Detokenize(Strict):
    """Body of ``/v1/detokenize``."""

    model: str | None = None
    tokens: list[int]
