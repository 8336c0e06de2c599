"""Two processes on one machine decode a text together, and none of them outlives another."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from grinqh_jax.errors import UsageError
from grinqh_jax.sharding import processes

SECONDS = 120


def start(directory, number, port, *flags):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    mesh = f"--mesh tp=2 --coordinator 127.0.0.1:{port} --processes 2 --process-id {number}".split()
    command = "-m", "grinqh_jax", "generate", "--model", str(directory), "--temp", "0"
    return subprocess.Popen(
        [sys.executable, *command, *mesh, *flags, "a prompt"],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["off", "lookup"])
def test_two_processes_write_the_text_of_one(graded_directory, generator, port, drafter):
    from grinqh_jax.decoding.load_speculation import speculation_of
    from grinqh_jax.decoding.request import Request
    from grinqh_jax.decoding.speculation.setting import SpeculationSetting

    request = Request(bits=3.0, max_tokens=20, temperature=0.0)
    speculation = speculation_of(SpeculationSetting.parse(drafter), generator)
    expected = "".join(generator.generate("a prompt", request, speculation=speculation))
    flags = "--bits", "3", "--max-tokens", "20", "--speculate", drafter
    with (
        start(graded_directory, 0, port, *flags) as first,
        start(graded_directory, 1, port, *flags) as second,
    ):
        text, figures = first.communicate(timeout=SECONDS)
        other_text, _ = second.communicate(timeout=SECONDS)
    assert [first.returncode, second.returncode] == [0, 0], figures
    assert text == expected + "\n"
    assert other_text == ""
    assert "realised bits" in figures


@pytest.mark.slow
def test_if_a_process_dies_the_other_ends_with_an_error(graded_directory, port):
    flags = "--bits", "3", "--max-tokens", "100000", "--max-context", "120"
    with (
        start(graded_directory, 0, port, *flags) as first,
        start(graded_directory, 1, port, *flags) as second,
    ):
        time.sleep(8)
        second.send_signal(signal.SIGKILL)
        started = time.monotonic()
        _, errors = first.communicate(timeout=SECONDS)
    assert time.monotonic() - started < 60
    assert first.returncode != 0
    # JAX says the latter if it notices before this library.
    assert "all processes end" in errors or "another task died" in errors, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "--processes and --process-id need --coordinator"),
        (("auto", 2, 0), "reads the processes from the environment"),
        (("host:1", None, None), "needs --processes N and --process-id I"),
        (("host:1", 2, 2), "from 0 to N - 1; got 2 and 2"),
    ],
)
def test_flags_that_do_not_fit_each_other_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        processes.join(*arguments)
