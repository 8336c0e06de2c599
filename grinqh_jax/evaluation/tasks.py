"""Accuracy on word problems: decodes a chain of thought and compares its final number with the answer."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from grinqh_jax.decoding.bits import Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.completion import complete
from grinqh_jax.evaluation.result import with_error
from grinqh_jax.text.documents import read_records

_NEXT_QUESTION = "Question:"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"####\s*(" + _NUMBER.pattern + r")")
"""A number after ``####``, which marks the answer in GSM8K."""

_COMPLETE = re.compile(_MARKED.pattern + r"[.,]?\s")
"""A marked number and the blank after it. Text behind it cannot change the answer."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and its numeric answer."""

    question: str
    answer: Decimal

    @property
    def prompt(self) -> str:
        """The text that the model continues."""
        return f"Question: {self.question}\nAnswer:"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Result of ``evaluate`` at one setting of the dial.

    Attributes:
      bits: Setting of the dial.
      realised_bits: Mean bits read per weight over all decode steps; None for an unquantized model.
      realised_bits_without_head: The same without the output projection.
      accuracy: Share of problems whose final number is right.
      stderr: Standard error of ``accuracy``, ``sqrt(accuracy (1 - accuracy) / n)``.
      n: Number of problems.
      right: Whether the answer to each problem is right.
    """

    bits: Bits
    realised_bits: float | None
    realised_bits_without_head: float | None
    accuracy: float
    stderr: float
    n: int
    right: tuple[bool, ...] = dataclasses.field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Returns all fields except ``right``, by name."""
        fields = dataclasses.asdict(self)
        del fields["right"]
        return fields

    def cells(self) -> dict[str, Any]:
        """Returns the cells of a table row by column title."""
        return {
            "bits": self.bits,
            "bits read": None if self.realised_bits is None else f"{self.realised_bits:.3f}",
            "accuracy": with_error(self.accuracy, self.stderr, ".4f"),
            "n": self.n,
        }


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Reads problems in the format of GSM8K.

    Each line is a JSON object with ``question`` and an ``answer`` that ends in ``#### N``.

    Raises:
      UsageError: The file cannot be read, holds no problem, or has bad records, whose lines it names.
    """
    problems = read_records(path, _problem, "a string under question and an answer that ends in #### N")
    if not problems:
        raise UsageError(f"{path} holds no problems")
    return problems[:limit]


def final_number(text: str) -> Decimal | None:
    """Extracts the final answer from a chain of thought; None if it has no number.

    This is the number after the first ``####``, or the last number of a text without ``####``. Text from the
    next ``Question:`` on is ignored, as are commas and dollar signs in numbers: ``$1,000.0`` is 1000.
    """
    text = text.split(_NEXT_QUESTION)[0]
    marked = _MARKED.search(text)
    numbers = [marked.group(1)] if marked else _NUMBER.findall(text)
    return Decimal(re.sub(r"[$,]", "", numbers[-1])) if numbers else None


def evaluate(
    generator: Generator,
    problems: Sequence[Problem],
    bits: Bits,
    *,
    max_tokens: int = 256,
    batch: int = 64,
    speculation: Speculation | None = None,
    on_progress: Callable[[int], Any] = lambda problems: None,
) -> Accuracy:
    """Answers every problem greedily and counts the right answers.

    An answer ends with a stop token, after its final number, or at the next question. Answers are decoded by
    ``completion.complete``.

    Args:
      generator: Model and tokenizer.
      problems: Problems, at least one.
      bits: Setting of the dial.
      max_tokens: Largest number of tokens per answer.
      batch: Largest number of problems decoded together.
      speculation: See ``completion.complete``.
      on_progress: Called with the number of problems in a batch after each batch.

    Raises:
      UsageError: ``bits`` are out of the dial's range, or a prompt is longer than the model's context.
    """
    completions = complete(
        generator,
        [generator.tokenizer.encode(problem.prompt) for problem in problems],
        bits,
        max_tokens=max_tokens,
        batch=batch,
        speculation=speculation,
        ended=lambda text: _NEXT_QUESTION in text or _COMPLETE.search(text) is not None,
        on_progress=on_progress,
    )
    right = [
        final_number(text) == problem.answer
        for problem, text in zip(problems, completions.texts, strict=True)
    ]
    accuracy = sum(right) / len(right)
    return Accuracy(
        bits=bits,
        realised_bits=completions.bits.mean(generator.model),
        realised_bits_without_head=completions.bits.mean(generator.model, head=False),
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / len(right)),
        n=len(right),
        right=tuple(right),
    )


def _problem(record: Any) -> Problem | None:
    """Parses the JSON value of a line; None if it is not a problem."""
    match record:
        case {"question": str(question), "answer": str(answer)} if marked := _MARKED.findall(answer):
            return Problem(question, Decimal(re.sub(r"[$,]", "", marked[-1])))
    return None
