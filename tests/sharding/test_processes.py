"""Two processes on one machine decode a text together, and none of them outlives another."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from grinqh_jax.errors import UsageError
from grinqh_jax.sharding import processes

SECONDS = 120


def start(directory, number, port, *flags, verb="generate"):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    mesh = f"--mesh tp=2 --coordinator 127.0.0.1:{port} --processes 2 --process-id {number}".split()
    command = ["-m", "grinqh_jax", verb, "--model", str(directory)]
    command += ["--temp", "0", "a prompt"] if verb == "generate" else []
    return subprocess.Popen(
        [sys.executable, *command, *mesh, *flags],
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
        assert first.stdout.read(1), "no text"  # The first token; most of the text is still to come.
        second.send_signal(signal.SIGKILL)
        started = time.monotonic()
        _, errors = first.communicate(timeout=SECONDS)
    assert time.monotonic() - started < 60
    assert first.returncode != 0
    # JAX says the latter if it notices before this library.
    assert "all processes end" in errors or "another task died" in errors, errors


def served(first):
    """Returns the address of a server, when it listens."""
    for line in first.stderr:
        if "listens on" in line:
            return line.split()[-1]
    raise AssertionError("the server ended")


def completion(url, prompt):
    body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0, "bits": 8})
    request = urllib.request.Request(
        f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)["choices"][0]["text"]


SERVE = "--port", "0", "--served-model-name", "m", "--slots", "2", "--max-context", "128"


@pytest.mark.slow
def test_two_processes_serve_the_texts_of_one(graded_directory, generator, port):
    """Requests share prefixes, and run together. Both processes end when the first is told to."""
    from grinqh_jax.decoding.request import Request

    prompts = ["a prompt " * 9, "a prompt " * 9 + "and more", "another"]
    request = Request(bits=8.0, max_tokens=12, temperature=0.0)
    expected = ["".join(generator.generate(prompt, request)) for prompt in prompts]
    with (
        start(graded_directory, 0, port, *SERVE, "--prefill-chunk", "64", verb="serve") as first,
        start(graded_directory, 1, port, *SERVE, "--prefill-chunk", "64", verb="serve") as second,
    ):
        url = served(first)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            texts = list(pool.map(lambda prompt: completion(url, prompt), prompts * 2))
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=SECONDS)
        second.communicate(timeout=SECONDS)
    assert texts == expected * 2
    assert [first.returncode, second.returncode] == [0, 0], errors


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_if_a_process_of_a_server_dies_the_other_ends(killed, graded_directory, port):
    with (
        start(graded_directory, 0, port, *SERVE, verb="serve") as first,
        start(graded_directory, 1, port, *SERVE, verb="serve") as second,
    ):
        served(first)
        processes = [first, second]
        processes[killed].send_signal(signal.SIGKILL)
        started = time.monotonic()
        processes[1 - killed].communicate(timeout=SECONDS)
    assert time.monotonic() - started < 60
    assert processes[1 - killed].returncode != 0


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
