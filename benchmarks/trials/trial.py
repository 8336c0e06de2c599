"""A trial: the product with one thing changed."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from checkpoints_tools.calibration import statistics
from checkpoints_tools.convert import command as convert
from checkpoints_tools.quantizers import QUANTIZERS, Quantizer
from grinqh_jax.__main__ import main as grinqh

SETTINGS = "1.5,2,3,4,full"
TOKENS = "8192"
WINDOW = "512"
"""Settings of the dial, tokens per text, and tokens per window of the measurement."""

PLAIN_WEIGHTS = ("--no-refit", "--gains", "fitted")
"""Flags that disable everything that compensates for the errors of codes and thresholds."""

NOT_TRAINED = ("--gains", "fitted")
"""Flags that skip the training of the level gains, which takes most of a small model's time."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A conversion and a measurement with one change.

    Attributes:
      what: The change, in a few words.
      flags: Flags of the converter.
      change: Context in which conversion and measurement run; by default the unchanged product.
    """

    what: str
    flags: Sequence[str] = ()
    change: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def patched(*replacements: tuple[object, str, object]) -> Callable[[], contextlib.AbstractContextManager]:
    """Returns a ``change`` that replaces attributes, given as ``(owner, name, value)``."""

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for replacement in replacements:
                stack.enter_context(mock.patch.object(*replacement))
            yield

    return change


def rounded(through_layer: Callable, quantizer: Quantizer) -> Callable[[], contextlib.AbstractContextManager]:
    """Returns a ``change`` that rounds layers with ``quantizer`` on the statistics of ``through_layer``."""

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        inputs = mock.patch.object(statistics, "through_layer", through_layer)
        with inputs, mock.patch.dict(QUANTIZERS, rtn=quantizer):
            yield

    return change


def run(trial: Trial, model: str, calib: Path, calib_tokens: str, data: Sequence[Path], out: Path) -> dict:
    """Converts into ``out`` unless it exists, and measures each text; returns text -> ``perplexity --json``.

    May run only once per process, because compiled programs outlive the change.
    """
    with trial.change():
        if not out.exists():
            command = ["--model", model, "--calib", str(calib), "--tokens", calib_tokens, "--out", str(out)]
            if code := convert.main([*command, *trial.flags]):
                sys.exit(code)
        rows = {}
        for text in data:
            measured = [
                "perplexity",
                "--json",
                "--model",
                str(out),
                "--reference",
                model,
                "--data",
                str(text),
            ]
            measured += ["--bits", SETTINGS, "--tokens", TOKENS, "--sequence-length", WINDOW]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                if code := grinqh(measured):
                    sys.exit(code)
            rows[text.stem] = [json.loads(line) for line in printed.getvalue().splitlines()]
    return rows


def run_apart(name: str, arguments: Sequence[str]) -> None:
    """Runs a trial in a separate process, through this folder's ``__main__``."""
    command = [sys.executable, str(Path(__file__).parent), *arguments, "--run-one", name]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
