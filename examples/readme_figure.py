"""Draws the README's picture: quality and speed against the mean bits read per weight.

    python examples/readme_figure.py [--output docs/figures/quality_and_speed.svg]

Needs matplotlib (the extra ``eval``). The script reads committed result files only, and draws the same file
each time:

* Quality: ``docs/results/pareto-qwen3-32m.json``. KL divergence from the predictions of the unquantized model
  to those of the quantized one, mean over 8,192 tokens of books that were not used in calibration, of a Qwen3
  with 32 million parameters. GRINQH, RTN, GPTQ and AWQ have groups of 128 and the same calibration text.
* Tokens per second: ``benchmarks/results/decode-qwen3-8b-llama-3.1-8b-h200.json``. Whole model with random
  weights in the shape of Qwen3-8B, batch 1, greedy, context 1024, one NVIDIA H200. The dashed line is the
  bfloat16 model in the same run.
* Kernel time: ``benchmarks/results/matvec-h200.json``. Sum over the four projections of one decoder layer of
  Qwen3-8B, batch 1, one NVIDIA H200, with XLA's bfloat16 matvec and PyTorch's int4 matvec in the same run.

Bits read include the scales and zero points. They do not include the output projection of RTN, GPTQ and AWQ,
which keeps 16 bits; those of GRINQH do.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUALITY = ROOT / "docs/results/pareto-qwen3-32m.json"
DECODING = ROOT / "benchmarks/results/decode-qwen3-8b-llama-3.1-8b-h200.json"
MATVEC = ROOT / "benchmarks/results/matvec-h200.json"

TEXT, MODEL, CONTEXT = "books_test.txt", "Qwen3-8B", 1024
INT4_BITS = 4 + 32 / 128
"""Bits per weight that PyTorch's int4 matvec reads: a bfloat16 scale and zero point per group of 128."""

RED, BLUE, GREEN, GREY, BLACK = "#c0203a", "#2b6cb0", "#2f8f6b", "#777777", "#333333"


Points = list[tuple[float, float]]
"""``(bits read per weight, value)``, by ascending bits."""


def quality() -> dict[str, Points]:
    """Returns KL divergence (nats) against bits for GRINQH, RTN, GPTQ and AWQ."""
    rows = [row for row in _read(QUALITY)["rows"] if row["data"] == TEXT and row["shown"]]
    labels = ("GRINQH", "RTN", "GPTQ", "AWQ")
    return {
        label: sorted((row["bits_read"], row["kl"]) for row in rows if row["label"] == label)
        for label in labels
    }


def decoding() -> tuple[Points, float]:
    """Returns tokens per second against bits, and those of the bfloat16 model."""
    rows = [row for row in _read(DECODING)["shapes"][MODEL]["decode"] if row["context"] == CONTEXT]
    (bf16,) = (row["tokens_per_second"] for row in rows if row["bits"] == "bf16")
    graded = [row for row in rows if row["bits"] != "bf16"]
    return (
        sorted(
            (_bits(row["bytes_per_token"], row["bytes_per_token_bf16"]), row["tokens_per_second"])
            for row in graded
        ),
        bf16,
    )


def matvec() -> tuple[Points, float, float]:
    """Returns microseconds per layer against bits, those of XLA in bfloat16, and those of PyTorch in int4."""
    results = _read(MATVEC)
    weights = sum(k * n for k, n in map(_sizes, results["xla_bf16_us"]))
    by_bits = itertools.groupby(
        sorted(results["kernel"], key=lambda row: row["bits"]), lambda row: row["bits"]
    )
    layers = [list(rows) for _, rows in by_bits]
    return (
        sorted(
            (_bits(sum(row["bytes"] for row in layer), 2 * weights), sum(row["kernel_us"] for row in layer))
            for layer in layers
        ),
        sum(results["xla_bf16_us"].values()),
        sum(results["torch_int4_us"].values()),
    )


def _bits(size: float, size_bf16: float) -> float:
    """Returns the mean bits per weight of ``size`` bytes, given the bytes of the same weights in bfloat16."""
    return 16 * size / size_bf16


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape.split("x")))


def draw(output: Path) -> Any:
    """Draws the picture into a file; returns the matplotlib figure."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "svg.fonttype": "path",  # glyphs as outlines: looks the same without the font
        "svg.hashsalt": "quality_and_speed",  # identifiers do not change from run to run
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 4.4), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06, wspace=0.04)
        grid = figure.add_gridspec(2, 2)
        _draw_quality(figure.add_subplot(grid[:, 0]))
        speed = figure.add_subplot(grid[0, 1])
        _draw_decoding(speed)
        _draw_matvec(figure.add_subplot(grid[1, 1], sharex=speed))
        speed.tick_params(labelbottom=False)
        figure.savefig(output, metadata={"Date": None})
    return figure


def _draw_quality(axes) -> None:
    curves = quality()
    for label, colour, marker in (("RTN", GREY, "s"), ("GPTQ", BLUE, "D"), ("AWQ", GREEN, "^")):
        _plot(axes, curves[label], color=colour, marker=marker, markersize=5, linestyle=":")
        bits, kl = curves[label][0]
        _label(axes, label, bits, kl, (-8, -4), colour, weight="bold", ha="right")
    _draw_grinqh(axes, curves["GRINQH"])
    bits, kl = curves["GRINQH"][1]
    _label(axes, "GRINQH", bits, kl, (-8, -10), RED, weight="bold", ha="right")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("Quality: Qwen3 32M, unseen books")
    axes.set_ylabel("KL divergence to full precision (nats)")
    axes.set_xlabel("bits read per weight")
    axes.set_xlim(1, 4.5)
    axes.set_xticks([1, 2, 3, 4])
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.6)


def _draw_decoding(axes) -> None:
    curve, bf16 = decoding()
    _draw_grinqh(axes, curve)
    for bits, value in curve:
        _label(axes, f"{value:.0f}", bits, value, (4, 5), RED)
    _draw_level(axes, bf16, f"bf16: {bf16:.0f}")
    axes.set_title("Speed: Qwen3-8B shape, one H200")
    bits, value = curve[-2]
    _label(axes, "GRINQH", bits, value, (62, 2), RED, weight="bold")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(0, 950)


def _draw_matvec(axes) -> None:
    curve, bf16, int4 = matvec()
    _draw_grinqh(axes, curve)
    for bits, value in curve:
        _label(axes, f"{value:.1f}", bits, value, (2, -13), RED)
    axes.plot([INT4_BITS], [int4], color=BLUE, marker="D", markersize=5)
    _label(axes, f"PyTorch int4: {int4:.1f}", INT4_BITS, int4, (7, 0), BLUE)
    _draw_level(axes, bf16, f"XLA bf16: {bf16:.1f}")
    axes.set_title("Matrix-vector products of one layer")
    axes.set_ylabel("microseconds")
    axes.set_xlabel("bits read per weight")
    axes.set_ylim(0, 118)
    axes.set_xlim(1, 9)
    axes.set_xticks(range(1, 9))


def _plot(axes, points: Points, **style) -> None:
    axes.plot([bits for bits, _ in points], [value for _, value in points], **style)


def _draw_grinqh(axes, curve: Points) -> None:
    _plot(axes, curve, color=RED, marker="o", markersize=6, linewidth=2.4, zorder=5)


def _draw_level(axes, value: float, text: str) -> None:
    axes.axhline(value, color=BLACK, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.annotate(
        text,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=BLACK,
    )


def _label(axes, text: str, x: float, y: float, offset: Sequence[float], colour: str, **style) -> None:
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", color=colour, **style)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs/figures/quality_and_speed.svg",
        help="file to write (default: %(default)s)",
    )
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
