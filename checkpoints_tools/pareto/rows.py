"""Measuring: a row for every setting and text, kept in the work directory so that none is measured twice."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
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

_TOGETHER = 4
"""Settings measured at a time: they share the reference's predictions, and are lost together."""

ProgressBar = Callable[[str, int, str], contextlib.AbstractContextManager[Callable[[int], Any]]]
"""What ``Measurements`` shows its progress with, such as ``cli.progress.Progress``."""

Row = dict[str, Any]
"""A result as JSON. ``window_losses`` and ``window_tokens`` (of a text) or ``right`` (of problems) are what
paired comparisons need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A text to measure perplexity on: the first ``tokens`` (None: all) in windows."""

    path: Path
    tokens: int | None
    sequence_length: int
    kind: str = PERPLEXITY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """Word problems: the first ``limit`` (None: all), ``batch`` at a time."""

    path: Path
    limit: int | None
    max_tokens: int
    batch: int
    kind: str = ACCURACY


class Measurements:
    """Rows of one model, measured when they are first asked for.

    Args:
      context: loads models; its ``source`` is what texts are compared with.
      directory: where rows are kept.
      progress: opens a progress bar for a description, a number of units and their name.
    """

    def __init__(self, context: SweepContext, directory: Path, progress: ProgressBar):
        self._context = context
        self._progress = progress
        self._directory = directory
        self._reference: Generator | None = None

    def of(self, series: Series, data: Text | Tasks) -> Iterator[Row]:
        """The rows of all settings of a series on a text or on problems, in order."""
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

    def _file(self, series: Series, checkpoint: Path, bits: Bits, data: Text | Tasks) -> Path:
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
        self, series: Series, generator: Generator, settings: Sequence[Bits], data: Text | Tasks
    ) -> Iterator[tuple[Bits, Row]]:
        note = f"{series.label}, {data.path.name}"
        for bits in settings:
            generator.bits(series.dial(bits))  # raises if the checkpoint's dial does not go there
        if isinstance(data, Tasks):
            problems = read_problems(data.path, data.limit)
            for bits in settings:
                with self._progress(f"{note}, {bits} bits", len(problems), "problem") as progress:
                    yield bits, self._accuracy(series, generator, bits, problems, data, progress)
            return
        tokens = read_tokens(generator, data.path, data.tokens)
        for start in range(0, len(settings), _TOGETHER):
            some = settings[start : start + _TOGETHER]
            with self._progress(
                f"{note}, {', '.join(map(str, some))} bits", len(tokens), "token"
            ) as progress:
                yield from self._perplexities(series, generator, some, tokens, data, progress)

    def _perplexities(
        self, series: Series, generator: Generator, settings: Sequence[Bits], tokens, data: Text, progress
    ) -> Iterator[tuple[Bits, Row]]:
        if self._reference is None:
            self._reference = self._context.load(self._context.source.directory)
        started = time.monotonic()
        found = measure(
            generator.model,
            generator.targets,
            tokens,
            [series.dial(bits) for bits in settings],
            sequence_length=data.sequence_length,
            reference=self._reference.model,
            on_progress=progress,
        )
        seconds = (time.monotonic() - started) / len(settings)
        for bits, result in zip(settings, found, strict=True):
            yield (
                bits,
                _row(series, bits, data, result, seconds)
                | {
                    "window_losses": result.windows.loss.tolist(),
                    "window_tokens": result.windows.tokens.tolist(),
                },
            )

    def _accuracy(
        self, series: Series, generator, bits: Bits, problems: list[Problem], data: Tasks, progress
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
    series: Series, bits: Bits, data: Text | Tasks, result: Perplexity | Accuracy, seconds: float
) -> Row:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row))
    os.replace(partial, path)


def windows(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses and tokens of each window of a text's row."""
    return np.array(row["window_losses"]), np.array(row["window_tokens"])


def bits_read(row: Row) -> float:
    """The figure to compare by: of all linear layers, or without an output projection that is read whole."""
    return row["bits_read_layers" if row["method"] in (*FIXED, WHOLE_HEAD) else "bits_read_with_head"]
