"""Runs a verb: one-line errors, exit codes, and a status line during slow steps.

Exit codes: 0 success; 2 wrong usage or bad input, with a one-line reason on stderr; 130 interrupted by
Ctrl-C; 1 any other failure, such as a full disk.
"""

import argparse
import contextlib
import difflib
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

from grinqh_jax.errors import GrinqhError, GrinqhWarning

FAILURE, USAGE_ERROR, INTERRUPTED = 1, 2, 130


FLAGS_ELSEWHERE = {
    "--max-new-tokens": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--num-predict": "--max-tokens",
    "--predict": "--max-tokens",
    "--max-length": "--max-tokens",
    "--ctx-size": "--max-context",
    "--num-ctx": "--max-context",
    "--repeat-penalty": "--repetition-penalty",
    "--system": "--system-prompt",
    "--stop-sequence": "--stop",
    "--file": "--data",
    "--input": "--data",
    "--output": "--out",
}
"""Flags of other programs that users may try, and the flags of these verbs with the same meaning."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and names the flag that was probably meant.

    Words of a flag may be separated by underscores, too: ``--max_tokens`` is ``--max-tokens``.
    """

    def parse_args(self, args=None, namespace=None):
        """Parses the flags as ``ArgumentParser`` does. Unknown flags are reported before missing ones."""
        argv = [_hyphenated(arg) for arg in (sys.argv[1:] if args is None else args)]
        for arg in itertools.takewhile(lambda arg: arg != "--", argv):
            flag = arg.partition("=")[0]
            if self._looks_unknown(flag):
                self.error(f"unknown flag {flag}{did_you_mean(self._meant(flag))}")
        parsed, rest = self.parse_known_args(argv, namespace)
        if rest and rest[0].startswith("-"):
            self.error(f"unknown flag {rest[0]}{did_you_mean(self._meant(rest[0]))}")
        if rest:
            hint = "; put a prompt of several words in quotes" if hasattr(parsed, "prompt") else ""
            self.error(f"unexpected argument {rest[0]!r}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Prints ``message`` on one line, with the first long name of each flag, and exits."""
        message = re.sub(r"^argument (?:-\w/)*(\S+?)(?:/\S+)?: ", r"\1: ", message)
        message = message.replace("ignored explicit argument", "takes no value, but has")
        self.exit(USAGE_ERROR, f"error: {message} (see {self.prog} --help)\n")

    def _looks_unknown(self, flag: str) -> bool:
        """Whether ``flag`` is a long flag that does not exist, or a long flag with one hyphen."""
        options = self._option_string_actions
        if not flag.startswith("--"):
            return f"-{flag}" in options and flag not in options
        return " " not in flag and not any(option.startswith(flag) for option in options)

    def _meant(self, flag: str) -> str | None:
        """Returns the flag that is most like ``flag``; None if no flag is like it."""
        name = "--" + flag.lstrip("-")
        known = FLAGS_ELSEWHERE.get(name)
        options = [option for option in self._option_string_actions if option.startswith("--")]
        return known if known in options else closest(name, options)

    def _print_message(self, message: str, file=None) -> None:
        """Writes ``message``. ``ArgumentParser`` ignores that a device is full; a verb reports it."""
        if message:
            (file or sys.stderr).write(message)


def closest(word: str, words: Iterable[str]) -> str | None:
    """Returns the word that is most like ``word``; None if none is like it."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1)), None)


def did_you_mean(word: str | None) -> str:
    """Returns the end of an error message that suggests ``word``; an empty string for None."""
    return f"; did you mean {word}?" if word else ""


def _hyphenated(arg: str) -> str:
    """Returns a long flag with hyphens for underscores, and any other argument as it is."""
    if not arg.startswith("--"):
        return arg
    flag, separator, value = arg.partition("=")
    return flag.replace("_", "-") + separator + value


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
    sys.excepthook = _show_exception
    try:
        if hasattr(sys.stdout, "reconfigure"):
            # Output is UTF-8 in every locale. A path may hold bytes that are not.
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        with warnings.catch_warnings():
            warnings.simplefilter("always", GrinqhWarning)
            warnings.showwarning = _show_warning
            try:
                return command()
            finally:  # An error of a full device must occur here and not in the flush at exit.
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


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for programs that threads still compile in the background."""
    programs = sys.modules.get("grinqh_jax.decoding.programs")
    if programs is not None and programs.compiling():
        sys.stderr.flush()
        os._exit(code)  # XLA's threads may crash while the interpreter shuts down
    sys.exit(code)


def _show_exception(kind, error, traceback) -> None:
    """Prints an exception that nothing caught, except the echo of a write that failed.

    If one write of a checkpoint fails, Orbax (0.12.8) raises its error and closes its event loop. The threads
    of TensorStore (0.1.86) then report once for each unfinished write that the loop is closed.
    """
    if isinstance(error, RuntimeError) and "Event loop is closed" in str(error):
        return
    sys.__excepthook__(kind, error, traceback)


def _switch_x64_off() -> None:
    """Switches JAX's 64-bit types off in this process, because the code relies on 32-bit defaults.

    It does not import JAX.
    """
    os.environ["JAX_ENABLE_X64"] = "0"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_enable_x64", False)


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())
