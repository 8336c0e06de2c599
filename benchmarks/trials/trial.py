"""One thing that was tried: the product, with something changed in it."""

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

BITS = "1.5,2,3,4,full"
TOKENS = "8192"
WINDOW = "512"

PLAIN_WEIGHTS = ("--no-refit", "--gains", "fitted")
"""Flags with which nothing makes up for the errors of codes and thresholds."""

NOT_TRAINED = ("--gains", "fitted")
"""Flags that leave the training of the gains out, most of a small model's time."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A conversion and what its model loses.

    Attributes:
      what: is different, in a few words.
      flags: of the converter.
      change: a context in which model and measurement are made; by default the product as it is.
    """

    what: str
    flags: Sequence[str] = ()
    change: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def patched(*replacements: tuple[object, str, object]) -> Callable[[], contextlib.AbstractContextManager]:
    """A ``change``: attributes of modules or classes replaced, ``(owner, name, value)``."""

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for replacement in replacements:
                stack.enter_context(mock.patch.object(*replacement))
            yield

    return change


def rounded(through_layer: Callable, quantizer: Quantizer) -> Callable[[], contextlib.AbstractContextManager]:
    """A ``change``: layers are rounded by ``quantizer``, from what ``through_layer`` sees of their inputs."""

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        seeing = mock.patch.object(statistics, "through_layer", through_layer)
        with seeing, mock.patch.dict(QUANTIZERS, rtn=quantizer):
            yield

    return change


def run(trial: Trial, model: str, calib: Path, calib_tokens: str, data: Sequence[Path], out: Path) -> dict:
    """Converts, if that is not done, and measures on each text: rows of ``perplexity --json`` by text.

    To be called once in a process: compiled programs outlive a change.
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
            measured += ["--bits", BITS, "--tokens", TOKENS, "--sequence-length", WINDOW]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                if code := grinqh(measured):
                    sys.exit(code)
            rows[text.stem] = [json.loads(line) for line in printed.getvalue().splitlines()]
    return rows


def run_apart(name: str, arguments: Sequence[str]) -> None:
    """``run`` in a process of its own, by this folder's ``__main__``."""
    command = [sys.executable, str(Path(__file__).parent), *arguments, "--here", name]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
