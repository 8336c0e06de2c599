"""What the commands share: the model and the dial as flags, errors as one line, exit codes.

Exit codes: 0 done; 2 usage or bad input, with a one-line reason on stderr; 130 interrupted by Ctrl-C;
1 anything else.
"""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from grinqh_jax.errors import GrinqhError, UsageError

BUNDLED_MODEL = Path(__file__).parent / "models" / "qwen3-7m"
"""The checkpoint inside the package, used where no ``--model`` is given."""

USAGE_ERROR, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error of the commands."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message} (see {self.prog} --help)\n")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds ``--model``."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        default=str(BUNDLED_MODEL),
        help="GRINQH checkpoint, or an unquantized one for --bits full (default: the bundled qwen3-7m)",
    )


def bits(text: str) -> float | str:
    """An argparse type: mean bits per weight, or ``full``; whether they fit is the checkpoint's say."""
    if text == "full":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor full")
    return value


def read_prompt(text: str) -> str:
    """The prompt of ``--prompt``: the text itself, or for ``-`` all of standard input as it is.

    Raises:
      UsageError: it is not UTF-8.
    """
    if text == "-":
        return decode(sys.stdin.buffer.read(), "standard input")
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    return decode(text.encode("utf-8", "surrogateescape"), "the prompt")


def decode(data: bytes, place: str) -> str:
    """The text of bytes that should be UTF-8.

    Raises:
      UsageError: they are not; names the place and the first wrong byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{place} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it first (iconv -t utf-8)"
        ) from None


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Says on stderr what takes its time, for as long as it does; nothing where that is no terminal."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run(command: Callable[[argparse.Namespace], int], parser: Parser, argv: Sequence[str] | None) -> int:
    """Parses the flags and runs a command; returns the exit code and lets no user's mistake through."""
    args = parser.parse_args(argv)
    try:
        if hasattr(sys.stdout, "reconfigure"):  # text is UTF-8 whatever the locale says
            sys.stdout.reconfigure(encoding="utf-8")
        return command(args)
    except GrinqhError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
