"""The example scripts run from their command lines."""

import runpy
import sys
from pathlib import Path

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
