"""The README's picture: its numbers come from the committed result files, and it is current."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib (extra: eval) is not installed")

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "figures" / "quality_and_speed.svg"
LAYER = ("4096x6144", "4096x4096", "4096x24576", "12288x4096")
"""The projections of one decoder layer of Qwen3-8B: qkv, o, gate_up, down."""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_figure", ROOT / "examples" / "readme_figure.py")
    module = sys.modules["readme_figure"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(script, tmp_path_factory):
    """The figure, and the SVG file that it was written to."""
    path = tmp_path_factory.mktemp("figure") / "picture.svg"
    return script.draw(path), path


def result(name):
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def markers(axes):
    """Returns ``[(x, y), ...]`` of every line with markers: all curves and single points."""
    return [list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_marker() != "None"]


def levels(axes):
    """Returns the heights of the horizontal lines."""
    return [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "None"]


def texts(axes):
    return {text.get_text() for text in axes.texts}


def test_quality_comes_from_the_sweep(drawn):
    axes = drawn[0].axes[0]
    rows = [row for row in result("docs/results/pareto-qwen3-32m.json")["rows"] if row["shown"]]
    expected = [
        sorted(
            (row["bits_read"], row["kl"]) for row in rows if row["label"] == label and "books" in row["data"]
        )
        for label in ("RTN", "GPTQ", "AWQ", "GRINQH")
    ]
    assert [len(points) for points in expected] == [3, 3, 3, 5]
    assert markers(axes) == expected
    assert texts(axes) == {"RTN", "GPTQ", "AWQ", "GRINQH"}


def test_tokens_per_second_come_from_the_decoding_benchmark(drawn):
    axes = drawn[0].axes[1]
    shapes = result("benchmarks/results/decode-qwen3-8b-llama-3.1-8b-h200.json")["shapes"]
    rows = {row["bits"]: row for row in shapes["Qwen3-8B"]["decode"] if row["context"] == 1024}
    bf16 = rows.pop("bf16")
    (points,) = markers(axes)
    for (bits, speed), (asked, row) in zip(points, sorted(rows.items()), strict=True):
        assert speed == row["tokens_per_second"]
        assert bits == pytest.approx(asked + 0.125, abs=0.02)  # digits and scales
        assert f"{speed:.0f}" in texts(axes)
    assert levels(axes) == [bf16["tokens_per_second"]]
    assert f"bf16: {bf16['tokens_per_second']:.0f}" in texts(axes)


def test_kernel_times_come_from_the_matvec_benchmark(drawn):
    axes = drawn[0].axes[2]
    results = result("benchmarks/results/matvec-h200.json")
    curve, (int4,) = markers(axes)
    for (bits, time), asked in zip(curve, (2, 3, 4, 8), strict=True):
        times = [
            row["kernel_us"] for row in results["kernel"] if row["bits"] == asked and row["shape"] in LAYER
        ]
        assert len(times) == len(LAYER)
        assert time == pytest.approx(sum(times))
        assert bits == pytest.approx(asked + 0.125, abs=0.02)
        assert f"{time:.1f}" in texts(axes)
    assert int4 == (4.25, pytest.approx(sum(results["torch_int4_us"].values())))
    assert levels(axes) == [pytest.approx(sum(results["xla_bf16_us"].values()))]
    assert {f"PyTorch int4: {int4[1]:.1f}", f"XLA bf16: {levels(axes)[0]:.1f}"} <= texts(axes)


def test_the_picture_is_the_same_each_time_and_the_committed_one_is_current(script, drawn, tmp_path):
    first = drawn[1].read_bytes()
    script.draw(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first
    assert len(first) < 100_000

    def written(svg):  # matplotlib writes each text beside its outlines, as a comment
        return re.findall("<!-- (.*?) -->", svg)

    committed = written(PICTURE.read_text(encoding="utf-8"))
    assert len(committed) > 20
    assert committed == written(first.decode())
