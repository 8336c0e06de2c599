"""Draws the divergence of a chat model against bits read, for each text, beside RTN, GPTQ and AWQ.

    python examples/chat_model_figure.py [--output docs/figures/smollm2.svg]

Needs matplotlib (the extra ``eval``). The script reads a committed result of
``benchmarks/conversion_quality.py`` and draws the same file each time. Bits read include scales and zero
points, and for GRINQH the output projection, which the other methods leave in 16 bits.
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/conversion-quality-smollm2-h200.json"
VARIANT = "bundled+mixed"
"""Label of the converter's default for a model with a chat template."""

TEXTS = {"wiki": "WikiText-2", "books": "books", "docs": "documentation", "chat": "chat"}
METHODS = {"rtn": ("RTN", "#777777", "s"), "gptq": ("GPTQ", "#2b6cb0", "D"), "awq": ("AWQ", "#2f8f6b", "^")}
RED = "#c0203a"
SCALE_BITS, GROUP = 16, 128
MOST_BITS = 5
"""End of the horizontal axis."""


def fixed_points(rows: dict, method: str, text: str) -> list[tuple[float, float]]:
    """Returns ``(bits read, KL)`` of a fixed-precision method; a group has a scale and a zero point."""
    points = []
    for label, row in rows.items():
        name, _, bits = label.partition(":")
        if name == method:
            read = int(bits) + (SCALE_BITS + int(bits)) / GROUP
            points.append((read, row["texts"][text]["full"]["kl"]))
    return sorted(points)


def graded_points(rows: dict, text: str) -> list[tuple[float, float]]:
    """Returns ``(bits read, KL)`` of the GRINQH checkpoint."""
    settings = rows[VARIANT]["texts"][text].values()
    points = [(row["realised_bits"] + SCALE_BITS / GROUP, row["kl"]) for row in settings]
    return sorted(point for point in points if point[0] <= MOST_BITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figures/smollm2.svg", metavar="FILE")
    args = parser.parse_args()
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "grinqh-jax"
    rows = json.loads(RESULT.read_text())["rows"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (text, title) in zip(figure.subplots(1, len(TEXTS), sharey=True), TEXTS.items(), strict=True):
        axes.plot(*zip(*graded_points(rows, text), strict=True), "o-", color=RED, label="GRINQH")
        for method, (label, colour, marker) in METHODS.items():
            axes.plot(
                *zip(*fixed_points(rows, method, text), strict=True),
                marker,
                color=colour,
                label=label,
                ls=":",
            )
        axes.set(title=title, xlabel="bits read per weight", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("KL divergence, nats")
    figure.axes[-1].legend()
    figure.savefig(args.output, metadata={"Date": None})
    print(args.output)


if __name__ == "__main__":
    main()
