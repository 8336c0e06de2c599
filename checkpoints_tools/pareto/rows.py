"""Measures a row of results for every setting and text, and stores it, so that none is measured twice."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.pareto.series import FIXED, WHOLE_HEAD, Series, SweepContext, identity
from grinqh_jax.decoding.bits import Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.evaluation.perplexity import measure, read_tokens
from grinqh_jax.evaluation.result import Perplexity
from grinqh_jax.evaluation.tasks import Accuracy, Problem, evaluate, read_problems

PERPLEXITY, ACCURACY = "perplexity", "accuracy"

_MEASURED_TOGETHER = 4
"""Number of settings that share one pass of the reference model. An interruption loses their results."""

Row = dict[str, Any]
"""The results at one setting on one text or file of problems, as a JSON object. For paired comparisons, rows
of texts have ``window_losses`` and ``window_tokens``, and rows of problems have ``right``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFile:
    """A text to measure perplexity on.

    Attributes:
      path: Text file.
      tokens: Number of tokens from the beginning; None for all.
      sequence_length: Tokens of a window.
      kind: Name of the measure.
    """

    path: Path
    tokens: int | None
    sequence_length: int
    kind: str = PERPLEXITY


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemFile:
    """Word problems to measure accuracy on.

    Attributes:
      path: File of problems.
      limit: Number of problems from the beginning; None for all.
      max_tokens: Maximum number of tokens of an answer.
      batch: Maximum number of problems that are answered together.
      kind: Name of the measure.
    """

    path: Path
    limit: int | None
    max_tokens: int
    batch: int
    kind: str = ACCURACY


class Measurements:
    """Rows of one model, measured on first use.

    Args:
      context: Loads the models. Its ``source`` is the reference.
      directory: Directory of the rows.
    """

    def __init__(self, context: SweepContext, directory: Path):
        self._context = context
        self._directory = directory
        self._reference: Generator | None = None

    def of(self, series: Series, data: TextFile | ProblemFile) -> Iterator[Row]:
        """Yields the rows of all settings of a series on a text or on problems, in order."""
        for checkpoint, settings in series.groups().items():
            files = {bits: self._file(series, checkpoint, bits, data) for bits in settings}
            missing = [bits for bits in settings if not files[bits].exists()]
            if missing:
                generator = series.load(missing[0])
                for bits, row in self._measure(series, generator, missing, data):
                    _write(files[bits], row)
                del generator
            for bits in settings:
                yield json.loads(files[bits].read_text())

    def _file(self, series: Series, checkpoint: Path, bits: Bits, data: TextFile | ProblemFile) -> Path:
        """Returns the file of a row. Its name has a hash of everything that the row depends on."""
        facts = {
            "method": series.method,
            "bits": bits,
            "checkpoint": identity(checkpoint),
            "reference": identity(self._context.source.directory),
            "dtype": self._context.dtype,
            "data": hashlib.sha256(data.path.read_bytes()).hexdigest(),
            **{k: v for k, v in dataclasses.asdict(data).items() if k not in ("path", "batch")},
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        return self._directory / f"{series.method}-{bits}-{data.path.stem}-{key}.json"

    def _measure(
        self, series: Series, generator: Generator, settings: Sequence[Bits], data: TextFile | ProblemFile
    ) -> Iterator[tuple[Bits, Row]]:
        """Yields each setting with its row, as soon as it is measured."""
        note = f"{series.label}, {data.path.name}"
        for bits in settings:
            generator.bits(series.dial(bits))  # Raises if the checkpoint's dial does not reach it.
        if isinstance(data, ProblemFile):
            problems = read_problems(data.path, data.limit)
            for bits in settings:
                with self._context.progress(f"{note}, {bits} bits", len(problems), "problem") as progress:
                    yield bits, self._accuracy(series, generator, bits, problems, data, progress)
            return
        tokens = read_tokens(generator, data.path, data.tokens)
        for start in range(0, len(settings), _MEASURED_TOGETHER):
            together = settings[start : start + _MEASURED_TOGETHER]
            title = f"{note}, {', '.join(map(str, together))} bits"
            with self._context.progress(title, len(tokens), "token") as progress:
                yield from self._perplexities(series, generator, together, tokens, data, progress)

    def _perplexities(
        self, series: Series, generator: Generator, settings: Sequence[Bits], tokens, data: TextFile, progress
    ) -> Iterator[tuple[Bits, Row]]:
        if self._reference is None:
            self._reference = self._context.load(self._context.source.directory)
        started = time.monotonic()
        results = measure(
            generator.model,
            generator.targets,
            tokens,
            [series.dial(bits) for bits in settings],
            sequence_length=data.sequence_length,
            reference=self._reference.model,
            on_progress=progress,
        )
        seconds = (time.monotonic() - started) / len(settings)
        for bits, result in zip(settings, results, strict=True):
            row = _row(series, bits, data, result, seconds)
            row["window_losses"] = result.windows.loss.tolist()
            row["window_tokens"] = result.windows.tokens.tolist()
            yield bits, row

    def _accuracy(
        self, series: Series, generator, bits: Bits, problems: list[Problem], data: ProblemFile, progress
    ) -> Row:
        started = time.monotonic()
        result = evaluate(
            generator,
            problems,
            series.dial(bits),
            max_tokens=data.max_tokens,
            batch=data.batch,
            on_progress=progress,
        )
        row = _row(series, bits, data, result, time.monotonic() - started)
        return row | {"right": list(map(int, result.right))}


def _row(
    series: Series, bits: Bits, data: TextFile | ProblemFile, result: Perplexity | Accuracy, seconds: float
) -> Row:
    """Returns the fields that rows of texts and of problems have in common."""
    layers, everything = series.bits_read(bits, result.realised_bits_without_head, result.realised_bits)
    return {
        "method": series.method,
        "data": data.path.name,
        "measure": data.kind,
        **result.to_json(),
        "bits": bits,
        "bits_read_layers": layers,
        "bits_read_with_head": everything,
        "seconds": round(seconds, 1),
    }


def _write(path: Path, row: Row) -> None:
    """Writes a row, so that an interruption leaves no incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row))
    os.replace(partial, path)


def windows(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Returns the summed loss and the number of tokens of each window, from a row of a text."""
    return np.array(row["window_losses"]), np.array(row["window_tokens"])


def bits_read(row: Row) -> float:
    """Returns the bits read per weight by which methods are compared.

    They include the output projection, unless the method reads it at full precision.
    """
    return row["bits_read_layers" if row["method"] in (*FIXED, WHOLE_HEAD) else "bits_read_with_head"]
