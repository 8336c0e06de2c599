"""The example scripts run from their command lines."""

import json
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints_tools.export.exchange import write_safetensors
from grinqh_jax import Generator, Request
from grinqh_jax.checkpoint import load
from pallas_kernels import dequantize

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(monkeypatch, capsys, script, *flags):
    """Returns the standard output of a script, which must end without an error."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    code = 0
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    assert code == 0
    return capsys.readouterr().out


def test_turn_the_dial(monkeypatch, capsys, graded_directory):
    flags = ("--model", graded_directory, "--prompt", "ab", "--bits", 2, 8, "--max-tokens", 6)
    *texts, table = run(monkeypatch, capsys, "turn_the_dial.py", *flags).split("\n\n")
    assert [text.split(":")[0] for text in texts] == ["--- 2 bits", "--- 8 bits"]
    header, *layers = table.splitlines()
    assert header.split() == ["realised", "bits", "2", "8"]
    for layer in layers:
        _, low, high = layer.split()
        assert 0 <= float(low) < float(high) == 8


@pytest.mark.slow
def test_quality_against_bits(monkeypatch, capsys, graded_directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text to read, and a little more of it")
    flags = ("--model", graded_directory, "--data", text, "--bits", 2, "full")
    header, _, low, full = run(monkeypatch, capsys, "quality_against_bits.py", *flags).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, low, full)]
    assert cells[0][:3] == ["--bits", "bits read", "perplexity"]
    assert [row[0] for row in cells[1:]] == ["2.0", "full"]
    assert float(cells[1][1]) < float(cells[2][1]) == 8
    assert cells[2][3:] == ["1.000", "0.0000", "100.0%"]


def test_read_weights(monkeypatch, capsys, graded_directory, tmp_path):
    exported = write_safetensors(graded_directory, tmp_path / "exported")
    layer, *levels = run(monkeypatch, capsys, "read_weights.py", exported).splitlines()
    assert layer.startswith("layers.0.down: ")
    errors = [float(line.rsplit(maxsplit=1)[1]) for line in levels]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 < errors[0] < 1
    read = runpy.run_path(str(EXAMPLES / "read_weights.py"))["weights"]
    model = load(graded_directory).model
    for name in ("layers.0.qkv", "layers.0.down"):
        weight = model.graded_linear(name).weight
        for level in (1, 3):
            expected = np.asarray(dequantize(weight, level=level))
            ours = read(exported, name, level)[: expected.shape[0], : expected.shape[1]]
            np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_kernel_in_jax(monkeypatch, capsys):
    flags = ("--features", 128, "--steps", 100)
    dense, full, *fewer = run(monkeypatch, capsys, "kernel_in_jax.py", *flags).splitlines()
    accuracies = [float(line.rsplit(maxsplit=1)[1]) for line in (dense, full, *fewer)]
    assert accuracies[0] > 0.7
    assert abs(accuracies[1] - accuracies[0]) < 0.02
    assert full.startswith("thresholds times 0: 8.00 and 8.00 bits")
    bits = [sum(map(float, re.findall(r"\d+\.\d\d\b(?= and| bits)", line))) for line in (full, *fewer)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[-1]


@pytest.mark.slow
def test_serving_loop(graded_directory):
    """Two clients at once; one of them leaves, and one sends a wrong request."""
    script = [sys.executable, EXAMPLES / "serving_loop.py", "--model", graded_directory]
    process = subprocess.Popen(
        [*script, "--port", "0", "--max-context", "128"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=EXAMPLES.parent,
    )
    try:
        port = int(process.stdout.readline().rsplit(maxsplit=1)[1])

        def connect(request):
            connection = socket.create_connection(("127.0.0.1", port), timeout=60)
            connection.sendall(json.dumps(request).encode() + b"\n")
            lines = connection.makefile()
            connection.close()  # The connection ends when its file does.
            return lines

        request = {"prompt": "ab", "bits": 3, "max_tokens": 20, "temperature": 0, "stop_tokens": []}
        connect(request | {"max_tokens": 100}).close()
        with connect(request | {"bits": 99}) as wrong:
            assert "bits 99" in json.loads(wrong.readline())["error"]
        pieces = []
        with connect(request) as lines:
            while "finish_reason" not in (line := json.loads(lines.readline())):
                pieces.append(line["text"])
        assert line["finish_reason"] == "length"
        assert 2 < line["realised_bits"] < 4
        settings = Request(**{name: value for name, value in request.items() if name != "prompt"})
        alone = Generator.load(graded_directory).generate("ab", settings, max_context=128)
        assert "".join(pieces) == "".join(alone)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
