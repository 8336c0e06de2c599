"""Word problems answered by generation: a chain of thought is decoded, its final number compared."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from grinqh_jax.decoder import linear_names
from grinqh_jax.decoding import Decoding, NewTokens
from grinqh_jax.documents import read_records
from grinqh_jax.errors import UsageError
from grinqh_jax.generator import Bits, Generator
from grinqh_jax.sampling import Sampling
from grinqh_jax.statistics import weighted_mean

_NEXT_QUESTION = "Question:"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"####\s*(" + _NUMBER.pattern + r")")
_COMPLETE = re.compile(_MARKED.pattern + r"[.,]?\s")
"""A marked number that has ended: nothing that follows can change the answer."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and the number that answers it."""

    question: str
    answer: Decimal

    @property
    def prompt(self) -> str:
        """What the model continues."""
        return f"Question: {self.question}\nAnswer:"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What ``evaluate`` found at one setting of the dial.

    Attributes:
      bits: as asked.
      realised_bits: mean bits read per weight over all decode steps; None for an unquantized model.
      accuracy: share of problems whose final number is right.
      stderr: of ``accuracy``, ``sqrt(accuracy (1 - accuracy) / n)``.
      n: problems.
    """

    bits: Bits
    realised_bits: float | None
    accuracy: float
    stderr: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Problems in the format of GSM8K: JSON lines with ``question`` and ``answer``, which ends ``#### N``.

    Raises:
      UsageError: the file cannot be read, holds no problem, or has bad records; names all their lines.
    """
    problems = read_records(path, _problem, "a string under question and an answer that ends in #### N")
    if not problems:
        raise UsageError(f"{path} holds no problems")
    return problems[:limit]


def final_number(text: str) -> Decimal | None:
    """The answer that a chain of thought comes to.

    The number after the first ``####``; where the model never wrote one, the last number of all. Up to the
    next ``Question:``, if the model went on to ask one. Commas and dollar signs do not count:
    ``$1,000.0`` is 1000.
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
    progress: Callable[[int], Any] = lambda problems: None,
) -> Accuracy:
    """Answers every problem greedily and counts the right ones.

    Prompts are read at full precision, answers decoded graded, as in generation. A row of the batch
    ends with a stop token, with its final number, or when it asks the next question. Further settings
    of the dial compile nothing.

    Args:
      generator: model and tokenizer.
      problems: at least one.
      bits: setting of the dial.
      max_tokens: most tokens of an answer.
      batch: problems answered at a time.
      progress: called with the number of problems done, batch by batch.

    Raises:
      UsageError: ``bits`` are out of the checkpoint's range, or a prompt is longer than its context.
    """
    batch = min(batch, len(problems))
    thresholds = generator.thresholds(bits, batch)
    # Longest first: rows of a batch have prompts, and mostly answers, of similar lengths.
    prompts = [generator.tokenizer.encode(problem.prompt) for problem in problems]
    order = sorted(range(len(problems)), key=lambda i: -len(prompts[i]))
    right, steps = 0, _Steps()
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        decoding = Decoding(
            generator.model,
            [prompts[i] for i in rows] + [prompts[rows[0]]] * (batch - len(rows)),
            max_tokens=max_tokens,
            max_context=generator.model.config.max_position_embeddings,
            thresholds=thresholds,
            sampling=Sampling.create(batch),
            stop_tokens=generator.defaults.eos_tokens,
        )
        texts = _answers(generator, decoding, len(rows), batch, steps)
        right += sum(final_number(text) == problems[i].answer for i, text in zip(rows, texts, strict=True))
        progress(len(rows))
    accuracy = right / len(problems)
    return Accuracy(
        bits=bits,
        realised_bits=steps.realised_bits(generator),
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / len(problems)),
        n=len(problems),
    )


class _Steps:
    """Adds up the bits that decode steps read, by linear layer."""

    def __init__(self):
        self._bits: Any = 0.0
        self._count = 0

    def add(self, new: NewTokens, rows: int) -> None:
        if new.grades is None:
            return
        counts = np.array([len(tokens) for tokens in new.tokens[:rows]])
        valid = np.arange(len(new.grades.bits))[:, None] < counts
        self._bits = self._bits + np.sum(new.grades.bits[:, :rows], axis=(0, 1), where=valid[..., None])
        self._count += int(counts.sum())

    def realised_bits(self, generator: Generator) -> float | None:
        if not self._count:
            return None
        names = linear_names(generator.model.config)
        mean = dict(zip(names, (self._bits / self._count).tolist(), strict=True))
        return weighted_mean(generator.model, mean)


def _answers(generator: Generator, decoding: Decoding, rows: int, batch: int, steps: _Steps) -> list[str]:
    """Texts of the first ``rows`` rows; the others fill the batch up."""
    tokens: list[list[int]] = [[] for _ in range(rows)]
    texts = [""] * rows

    def take(new: NewTokens) -> None:
        ended = np.ones(batch, bool)
        for row in range(rows):
            tokens[row] += new.tokens[row]
            texts[row] = generator.tokenizer.decode(tokens[row])
            ended[row] = _NEXT_QUESTION in texts[row] or _COMPLETE.search(texts[row]) is not None
        steps.add(new, rows)
        decoding.stop(ended)

    take(decoding.prefill())
    for new in decoding.chunks():
        take(new)
    return texts


def _problem(record: Any) -> Problem | None:
    match record:
        case {"question": str(question), "answer": str(answer)} if marked := _MARKED.findall(answer):
            return Problem(question, Decimal(re.sub(r"[$,]", "", marked[-1])))
    return None
