"""Runs a verb: one-line errors, exit codes, and a status line during slow steps.

Exit codes: 0 success; 2 wrong usage or bad input, with a one-line reason on stderr; 130 interrupted by
Ctrl-C; 1 any other failure, such as a full disk.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from grinqh_jax.errors import GrinqhError, GrinqhWarning

FAILURE, USAGE_ERROR, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, as all verbs do, and not with the full usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message} (see {self.prog} --help)\n")


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Shows ``text`` on stderr while the block runs. Shows nothing if stderr is not a terminal."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Prints a ``GrinqhWarning`` as one line, and any other warning as Python does."""
    if issubclass(category, GrinqhWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)


def run(command: Callable[[argparse.Namespace], int], parser: Parser, argv: Sequence[str] | None) -> int:
    """Parses the flags, runs ``command`` on them and returns the exit code.

    A ``GrinqhError``, which reports a user's mistake, and an ``OSError``, such as a full disk, become a line
    on stderr, and so does each ``GrinqhWarning``. Any other exception is a bug and keeps its traceback.
    """
    return guarded(lambda: command(parser.parse_args(argv)))


def guarded(command: Callable[[], int]) -> int:
    """Runs ``command`` and turns its failures into lines on stderr and exit codes, as ``run`` does."""
    _switch_x64_off()
    try:
        if hasattr(sys.stdout, "reconfigure"):
            # Output is UTF-8 in every locale. A path may hold bytes that are not.
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        with warnings.catch_warnings():
            warnings.simplefilter("always", GrinqhWarning)
            warnings.showwarning = _show_warning
            try:
                return command()
            finally:  # a full device shows now, not in the flush at exit
                sys.stdout.flush()
    except GrinqhError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader of a pipe needs no message
            print(f"error: {error.filename or 'standard output'}: {_reason(error)}", file=sys.stderr)
        # The text that could not be written is still in the buffer, and the flush at exit would fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def _switch_x64_off() -> None:
    """Switches JAX's 64-bit types off in this process, which the code counts on. Does not import JAX."""
    os.environ["JAX_ENABLE_X64"] = "0"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_enable_x64", False)


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())
