"""How every verb runs: errors as one line, exit codes, a status line while something takes its time.

Exit codes: 0 done; 2 usage or bad input, with a one-line reason on stderr; 130 interrupted by Ctrl-C;
1 anything else.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from grinqh_jax.errors import GrinqhError

USAGE_ERROR, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error of the commands."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message} (see {self.prog} --help)\n")


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
