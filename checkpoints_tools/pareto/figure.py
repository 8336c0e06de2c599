"""The figure of a sweep: perplexity, KL divergence and accuracy against bits read or kernel time."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints_tools.pareto.rows import ACCURACY, Row
from checkpoints_tools.pareto.series import FIXED, GRINQH, SKIP_INT4, TRUNCATION, UNQUANTIZED, WHOLE_HEAD
from grinqh_jax.errors import UsageError

_STYLES = {
    "rtn": ("#8c8c8c", "s"),
    "gptq": ("#2b6cb0", "D"),
    "gptq-act-order": ("#63a0d8", "d"),
    "awq": ("#2f8f6b", "^"),
    SKIP_INT4: ("#d98e04", "v"),
    TRUNCATION: ("#8e6bb0", "P"),
    WHOLE_HEAD: ("#e8788a", "o"),
}
_GRINQH_COLOURS = ("#c0203a", "#7d1128", "#f2a7b2", "#a05060")
_FULL = "#333333"
_HEADROOM = 1.5
"""Top of the chart in units of the largest perplexity shown. Values off the chart are listed in the room
above."""

_BITS, _TIME = "bits_read", "kernel_us"
_X = {_BITS: "bits read per weight", _TIME: "kernel time, µs"}
_NAMES = {
    "perplexity": "perplexity",
    "kl": "KL divergence to full precision, nats",
    "accuracy": "accuracy",
}
"""Label of the vertical axis, by key of a row."""

_ERRORS = {"perplexity": "difference_stderr", "kl": "kl_stderr", "accuracy": "stderr"}
"""Key of the standard error, by key of the value."""

_NOTE = (
    "Bits of all linear layers, scales and zero points included, without the output projection where it is "
    "read whole: in 16 bits by RTN, GPTQ and AWQ, and by 'GRINQH, whole head'. Error bars: one standard "
    "error; perplexities are paired with full precision's."
)


def check(path: Path | None) -> None:
    """Checks that a figure can be drawn.

    Args:
      path: Path of the figure; None for a path with a known suffix.

    Raises:
      UsageError: matplotlib is missing, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "a figure needs matplotlib, which is not installed: pip install 'grinqh-jax[eval]', "
            "or ask for --no-figure"
        ) from None
    formats = Figure().canvas.get_supported_filetypes()
    if path and path.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(f"--figure {path}: expected a suffix of {', '.join(formats)}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the results of a sweep against bits and, in a second row, against kernel time if they have it.

    Args:
      results: Results that the sweep wrote as JSON.
      path: Path of the figure; its suffix selects the format.

    Raises:
      UsageError: See ``check``.
    """
    check(path)
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["shown"]]
    timed, note = any(row.get("kernel_us") for row in rows), _NOTE
    if timed:
        note += f" Time: {results['timing']['what']}; 4-bit integers by PyTorch's int4 kernel."
    panels = _panels(rows, timed)
    height, width = len(panels), len(panels[0])
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.4 * width + 0.4, 3.7 * height + 1.3), layout="constrained")
        grid = figure.subplots(height, width, squeeze=False)
        for axes, panel in zip(grid.flat, itertools.chain(*panels), strict=True):
            if panel is None:
                axes.set_axis_off()
                continue
            data, value, x = panel
            _draw_panel(axes, [row for row in rows if row["data"] == data], x, value)
            axes.set_title(data, fontsize=10, color="#555555")
            axes.set_xlabel(_X[x])
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=min(len(handles), 5),
            frameon=False,
            title=results["title"],
            title_fontproperties={"size": 13, "weight": "bold"},
        )
        note = textwrap.fill(note, 76 * width)
        figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
        figure.savefig(path, dpi=150)


def _panels(rows: Sequence[Row], timed: bool) -> list[list[tuple[str, str, str] | None]]:
    """Returns ``(data, value, x axis)`` of each panel, by row and column; None for an empty place.

    There is a column for each text or file of problems. If there is a single text, its KL divergence has a
    column beside its perplexity; otherwise a second row.
    """
    measures = dict.fromkeys((row["data"], row["measure"]) for row in rows)
    main = [(data, ACCURACY if measure == ACCURACY else "perplexity") for data, measure in measures]
    texts = [data for data, value in main if value != ACCURACY]
    if len(texts) == 1:
        main.insert(main.index((texts[0], "perplexity")) + 1, (texts[0], "kl"))
    panels: list[list[tuple[str, str, str] | None]] = [[(*panel, _BITS) for panel in main]]
    if len(texts) > 1:
        panels.append([(data, "kl", _BITS) if value != ACCURACY else None for data, value in main])
    return panels + ([[(*panel, _TIME) for panel in main]] if timed else [])


def _draw_panel(axes, rows: Sequence[Row], x: str, value: str) -> None:
    """Draws one panel: a line for each series, and full precision as a horizontal line."""
    full = next((row for row in rows if row["method"] == UNQUANTIZED), {})
    labels = list(dict.fromkeys(row["label"] for row in rows if row["method"] == GRINQH))
    rows = [row for row in rows if row["method"] != UNQUANTIZED and row.get(x) is not None]
    top = _top(rows) if value == "perplexity" else math.inf
    off_chart: list[tuple[float, str, str]] = []
    _set_axes(axes, value)
    for label in dict.fromkeys(row["label"] for row in rows):
        points = sorted((row for row in rows if row["label"] == label), key=lambda row: row[x])
        method = points[0]["method"]
        colour, marker = (
            (_GRINQH_COLOURS[labels.index(label) % 4], "o") if method == GRINQH else _STYLES[method]
        )
        shown = [row for row in points if row[value] <= top]
        first = label in labels[:1]
        axes.errorbar(
            [row[x] for row in shown],
            [row[value] for row in shown],
            yerr=[row[_ERRORS[value]] or 0 for row in shown],
            color=colour,
            marker=marker,
            markersize=6 if first else 5,
            linewidth=2.2 if first else 1.1,
            linestyle=":" if method in FIXED else "-",
            elinewidth=0.9,
            label=label,
            zorder=5 if first else 3,
        )
        off_chart += [(row[x], f"{label} {row[value]:,.0f} ↑", colour) for row in points if row[value] > top]
    _annotate(axes, off_chart)
    if full.get(value) is not None and value != "kl":
        label = "full precision (16 bits)"
        axes.axhline(full[value], color=_FULL, linewidth=1, linestyle=(0, (5, 3)), label=label)
        if full.get("kernel_us") and x == _TIME:
            axes.plot(full[x], full[value], color=_FULL, marker="*", markersize=10, clip_on=False, zorder=6)
    if value == "perplexity":
        axes.set_ylim(0.99 * min(row[value] for row in (full, *rows) if row), top)


def _set_axes(axes, value: str) -> None:
    """Sets scale, label, ticks and grid of a panel's axes."""
    if value != "accuracy":
        axes.set_yscale("log")
    axes.set_ylabel(_NAMES[value])
    axes.grid(True, which="both", axis="y", color="#e6e6e6", linewidth=0.6)
    axes.grid(True, axis="x", color="#f0f0f0", linewidth=0.6)
    axes.set_axisbelow(True)
    if value == "perplexity":
        from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _top(rows: Sequence[Row]) -> float:
    """Returns the top of the axis: above all perplexities of GRINQH, and of other methods from 3 bits on."""
    within = [row["perplexity"] for row in rows if row["method"] == GRINQH or row["bits"] >= 3]
    return _HEADROOM * max(within or [row["perplexity"] for row in rows], default=1.0)


def _annotate(axes, beyond: Sequence[tuple[float, str, str]]) -> None:
    """Lists the values off the chart ``(x, text, colour)`` at its upper edge, one below the other."""
    for i, (x, text, colour) in enumerate(sorted(beyond)):
        axes.annotate(
            text,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -1 - 9 * i),
            textcoords="offset points",
            color=colour,
            fontsize=7.5,
            va="top",
        )
