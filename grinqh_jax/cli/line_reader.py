"""Reads the lines of a conversation: from a terminal with editing and history, or from a pipe or file."""

import contextlib
import os
import sys
from pathlib import Path

from grinqh_jax.cli import text_input
from grinqh_jax.errors import UsageError
from grinqh_jax.text.unicode import decode

HISTORY_LINES = 1000
"""Number of lines of earlier conversations that the arrow keys reach."""


def history_file() -> Path:
    """Returns the file that keeps the lines of earlier conversations, in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "grinqh-jax" / "chat_history"


class LineReader:
    """Reads lines from standard input. As a context manager it reads and writes the history of a terminal.

    Attributes:
      is_terminal: Whether a person types at a terminal and sees the answers there.
    """

    def __init__(self):
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._lines_read = 0
        self._interrupted = False
        self._readline = None

    def __enter__(self) -> "LineReader":
        if self.is_terminal:
            with contextlib.suppress(ImportError):  # Python may be built without it
                import readline

                self._readline = readline
        if self._readline is not None:
            self._readline.set_history_length(HISTORY_LINES)
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home directory
                self._readline.read_history_file(history_file())
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._readline is not None:
            with contextlib.suppress(OSError, RuntimeError):
                history_file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._readline.write_history_file(history_file())

    def read(self) -> str | None:
        """Returns the next line without surrounding white space; None at the end.

        Ctrl-C discards the line; a second Ctrl-C ends the input.

        Raises:
          UsageError: the line is not UTF-8. The next call reads the line after it.
        """
        try:
            line = self._next_line()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if self._interrupted or not self.is_terminal:
                return None
            self._interrupted = True
            print("Ctrl-C once more, Ctrl-D or /exit ends the conversation.", file=sys.stderr)
            return ""
        self._interrupted = False
        return None if line is None else line.strip()

    def _next_line(self) -> str | None:
        self._lines_read += 1
        if self.is_terminal:
            try:
                return text_input.argument(input("> "), "the line")
            except EOFError:
                print(file=sys.stderr)  # the cursor is behind the prompt
                return None
            except UnicodeDecodeError as error:
                raise UsageError(f"the line is not text in the terminal's encoding: {error}") from None
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        return decode(line, text_input.STANDARD_INPUT, self._lines_read) if line else None
