"""``chat`` as a person meets it, in a pseudo-terminal."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

from grinqh_jax.cli.line_reader import HISTORY_LINES

START = """
import os, runpy, signal, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes the terminal send the signal of Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.argv[0] = "grinqh_jax"
runpy.run_module("grinqh_jax", run_name="__main__", alter_sys=True)
"""


class Terminal:
    """The command line in a pseudo-terminal."""

    def __init__(self, *arguments: str, **environment: str):
        self.text = ""
        self._screen, terminal = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env=os.environ | environment,
        )
        os.close(terminal)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._screen)

    def type(self, keys: str | bytes) -> None:
        os.write(self._screen, keys if isinstance(keys, bytes) else keys.encode())

    def interrupt(self, answer: str) -> None:
        """Presses Ctrl-C until ``answer`` appears.

        Once may not be enough: CPython's readline does not notice a signal that arrives between its prompt
        and its wait for a key.
        """
        end = time.monotonic() + 60
        while answer not in self.text:
            assert time.monotonic() < end, f"no {answer!r} after Ctrl-C"
            self.type("\x03")
            self._read(answer, 5)
        self.until(answer)

    def until(self, expected: str, seconds: float = 120) -> str:
        """Reads up to ``expected``; returns the text since the last call."""
        self._read(expected, seconds)
        before, found, self.text = self.text.partition(expected)
        assert found, f"{expected!r} is not in {before!r}"
        return before + found

    def _read(self, expected: str, seconds: float) -> None:
        """Reads the screen until ``expected`` appears or the process or the time ends."""
        end = time.monotonic() + seconds
        while expected not in self.text and time.monotonic() < end:
            if select.select([self._screen], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self._screen, 1 << 16).decode(errors="replace")
                except OSError:  # the process has ended
                    break

    def exit_code(self) -> int:
        return self._process.wait(60)


@pytest.mark.slow
def test_a_conversation_in_a_terminal(chat_directory, tmp_path):
    environment = {"JAX_PLATFORMS": "cpu", "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    environment |= {"INPUTRC": os.devnull, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Terminal("chat", "--model", str(chat_directory), "-n", "5", **environment) as chat:
        assert "tiny: 4 bits per weight; /help lists the commands" in chat.until("> ")
        chat.type("hex\x7fllo\n")  # a key too many, and backspace
        assert "the answer ended after 5 tokens" in chat.until("> ")
        chat.type("/stats\n")
        assert "prompt: " in chat.until("peak memory")
        chat.until("> ")
        chat.type("half a line")
        chat.until("half a line")
        chat.interrupt("Ctrl-C once more, Ctrl-D or /exit ends the conversation.")
        chat.until("> ")
        chat.type(b"\xff\n")
        assert "error: " in chat.until("> ")
        chat.type("\x1b[200~two\nlines\x1b[201~\n")  # pasted lines are one message
        assert chat.until("> ").count("the answer ended") == 1
        chat.type("\x1b[A\x1b[A\x1b[A\x1b[A\n")  # the arrow key finds earlier lines
        assert "the answer ended" in chat.until("> ")
        chat.type("/exit\n")
        assert chat.exit_code() == 0
    history = (tmp_path / "grinqh-jax" / "chat_history").read_text(errors="replace").splitlines()
    assert history[:2] == ["hello", "/stats"]
    assert len(history) <= HISTORY_LINES
