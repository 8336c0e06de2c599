"""The progress of a long command, as a real process shows it on a terminal and in a file."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time

PROGRAM = """
import time
from grinqh_jax.cli import progress
progress.LINE_SECONDS = {seconds}
with progress.Progress("convert model", 4.0) as show:
    for step in range(4):
        time.sleep(0.2)
        show(1.0, f"refit layers.{{step}}")
"""


def command(seconds):
    return [sys.executable, "-c", PROGRAM.format(seconds=seconds)]


def test_a_terminal_shows_a_bar_with_step_time_left_and_memory():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with subprocess.Popen(command(60), stderr=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        shown = b""
        try:
            while more := os.read(ours, 1 << 16):
                shown += more
        except OSError:  # Linux reports the end of a terminal as an error.
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(ours)
    assert process.returncode == 0
    updates = shown.decode().replace("\r", "\n").splitlines()
    half = next(line for line in updates if "refit layers.1" in line)
    assert half.startswith("convert model:  50%|")
    assert "00:00<00:00, refit layers.1, " in half
    assert half.rstrip().endswith(" MiB")
    assert any("100%" in line for line in updates)


def test_a_file_gets_a_line_now_and_then():
    started = time.monotonic()
    lines = subprocess.run(command(0.3), stderr=subprocess.PIPE, text=True, check=True).stderr.splitlines()
    assert time.monotonic() - started > 0.8
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("convert model: 50%, 00:00 left, refit layers.1, ")
    assert lines[0].endswith(" MiB")


def test_a_file_gets_no_line_in_the_first_minute():
    assert subprocess.run(command(60), stderr=subprocess.PIPE, text=True, check=True).stderr == ""
