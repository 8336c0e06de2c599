"""The settings of one text. This module does not import JAX, so the command line checks its flags at once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from grinqh_jax.decoding.bits import Bits
from grinqh_jax.errors import UsageError
from grinqh_jax.ranges import Range, readable

PENALTY_RANGES = {
    "repetition_penalty": Range(1e-3, 1e3),
    "presence_penalty": Range(-100, 100),
    "frequency_penalty": Range(-100, 100),
}
"""Accepted penalties (see ``penalties.Penalties``)."""

RANGES = {
    "max_tokens": Range(1, 2**31 - 1),
    "temperature": Range(0, 1e6),
    "top_k": Range(0, 2**31 - 1),
    "top_p": Range(1e-6, 1),
    "min_p": Range(0, 1),
    **PENALTY_RANGES,
}
"""Accepted values of the numbers of a request."""

LOGIT_BIAS_RANGE = Range(-100, 100)
"""Accepted numbers of ``Request.logit_bias``, as in OpenAI's API."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of a generation. None selects the model's default (``GenerationConfig``, ``DEFAULT_BITS``).

    Attributes:
      bits: Mean bits to read per weight, within the range of the checkpoint's dial, or ``"full"``, the only
        setting of an unquantized model.
      max_tokens: Largest number of tokens to generate; the context may end the text earlier.
      temperature: Sampling temperature; 0 is greedy.
      top_k, top_p, min_p: Filters of the tokens that are sampled from (see ``sampling.Sampling``).
      seed: Seed of sampling. Equal seeds give equal texts.
      stop: Strings that end the text and are not part of it; one string or several.
      repetition_penalty, presence_penalty, frequency_penalty: Penalties on repeated tokens (see
        ``penalties.Penalties``).
      stop_tokens: Tokens that end the text; none if empty. They are part of the generated tokens.
      logit_bias: Numbers added to the logits of tokens, by token, each -100 to 100.

    Raises:
      UsageError: A value is out of range. The message names all such values.
    """

    bits: Bits | None = None
    max_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stop: str | Sequence[str] = ()
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop_tokens: Sequence[int] | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.stop, str):  # As a sequence it would be one stop string for each character.
            object.__setattr__(self, "stop", (self.stop,))
        problems = out_of_range({name: getattr(self, name) for name in RANGES})
        if any(not text for text in self.stop):
            problems.append("a stop string is empty")
        problems += [
            f"the logit bias of token {token} is {readable(bias)}, {LOGIT_BIAS_RANGE.expected(bias)}"
            for token, bias in self.logit_bias.items()
            if bias not in LOGIT_BIAS_RANGE
        ]
        if problems:
            raise UsageError("; ".join(problems))


def out_of_range(
    values: Mapping[str, float | None], label: Callable[[str], str] = lambda name: name
) -> list[str]:
    """Returns a message for each value outside its range in ``RANGES``.

    Args:
      values: Values by name; None is accepted.
      label: Function from a name to the name in the message, such as a flag.
    """
    return [
        f"{label(name)} is {readable(value)}, {RANGES[name].expected(value)}"
        for name, value in values.items()
        if value is not None and value not in RANGES[name]
    ]
