"""``python -m checkpoints_tools.pareto``: sweeps the quality of methods and settings against bits read."""

import argparse
import dataclasses
import datetime
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from checkpoints_tools.pareto import figure, flags, paired, table
from checkpoints_tools.pareto.rows import (
    ACCURACY,
    PERPLEXITY,
    Measurements,
    ProblemFile,
    Row,
    TextFile,
    bits_read,
)
from checkpoints_tools.pareto.series import (
    FIXED,
    GRINQH,
    METHODS,
    SKIP_INT4,
    TRUNCATION,
    UNQUANTIZED,
    WHOLE_HEAD,
    Series,
    SweepContext,
)
from checkpoints_tools.pareto.timing import Timing
from grinqh_jax import __version__
from grinqh_jax.cli import command as cli
from grinqh_jax.cli.progress import Progress
from grinqh_jax.errors import UsageError
from grinqh_jax.hf import open_checkpoint

_PAIRED = ("window_losses", "window_tokens", "right")
"""Keys of a row for paired comparisons. The results leave them out because they are long."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code (``cli.command``), 1 if ``--sweep`` finds a rise."""
    return cli.run(pareto, flags.parser(), argv)


def pareto(args: argparse.Namespace) -> int:
    """Sweeps as the flags say.

    Raises:
      GrinqhError: The flags, a checkpoint or a text are unusable.
    """
    if args.draw:
        return _redraw(args)
    flags.check(args)
    source = open_checkpoint(args.model)
    timing = Timing(args.timing, source.config) if args.timing else None
    context = SweepContext(
        source=source,
        work=args.work / source.directory.name,
        calib=args.calib,
        calib_tokens=args.calib_tokens,
        dtype=args.dtype,
        progress=Progress,
    )
    if args.dtype == "float32":  # By default a GPU multiplies float32 in fewer bits.
        jax.config.update("jax_default_matmul_precision", "highest")
    path = args.json or context.work / "pareto.json"
    facts = _circumstances(args, context, timing)
    results: dict[str, Any] = {}
    for findings in _measure(args, context, timing):
        results = facts | findings
        # Written after each curve, so that an interrupted sweep keeps its results.
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"results: {path}")
    code = _verdict(results["sweep"])
    if not args.no_figure:
        picture = args.figure or context.work / "pareto.png"
        figure.draw(results, picture)
        print(f"figure: {picture}")
    return code


def _measure(
    args: argparse.Namespace, context: SweepContext, timing: Timing | None
) -> Iterator[dict[str, Any]]:
    """Measures all curves on all texts and problems, and prints a table for each of these.

    Yields:
      The findings so far (see ``_findings``), after each curve.
    """
    series = _series(args, context)
    for curve in series:
        curve.groups()  # Makes the checkpoints, or raises, before anything is measured.
    measurements = Measurements(context, context.work / "rows")
    by_data: list[list[Row]] = []
    for data in _data(args):
        by_data.append([])
        for curve in series:
            by_data[-1] += _rows(measurements, curve, data, timing)
            yield _findings(by_data, args.sweep)
        print(table.markdown([row for row in by_data[-1] if row["shown"]]), flush=True)


def _data(args: argparse.Namespace) -> list[TextFile | ProblemFile]:
    """Returns the texts and the problems that the flags name."""
    texts = [
        TextFile(path=path, tokens=args.tokens, sequence_length=args.sequence_length) for path in args.data
    ]
    problems = [
        ProblemFile(path=path, limit=args.limit, max_tokens=args.max_tokens, batch=args.batch)
        for path in args.tasks
    ]
    return [*texts, *problems]


def _circumstances(args: argparse.Namespace, context: SweepContext, timing: Timing | None) -> dict[str, Any]:
    """Returns the fields of the results that say how and on what they were measured."""
    model = context.source.directory.name
    return {
        "title": args.title or f"{model}: quality against bits",
        "model": model,
        "command": args.command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "versions": {"grinqh-jax": __version__, "jax": jax.__version__},
        "calibration": {"text": context.calibration.name, "tokens": args.calib_tokens},
        "measured": {
            "tokens": args.tokens,
            "sequence_length": args.sequence_length,
            "problems": args.limit,
            "dtype": args.dtype or "default",
        },
        "timing": timing and {"file": args.timing.name, "what": timing.what},
    }


def _findings(by_data: Sequence[Sequence[Row]], sweep: Sequence[float]) -> dict[str, Any]:
    """Returns the fields of the results that were measured: rows, steps of the sweep, paired comparisons."""
    texts = [rows for rows in by_data if rows[0]["measure"] == PERPLEXITY]
    rows = itertools.chain(*by_data)
    return {
        "rows": [{key: value for key, value in row.items() if key not in _PAIRED} for row in rows],
        "sweep": [_sweep(rows, sweep) for rows in texts if sweep and _first_curve(rows)],
        "comparisons": list(itertools.chain(*map(_comparisons, texts))),
    }


def _series(args: argparse.Namespace, context: SweepContext) -> list[Series]:
    """Returns the curves that the flags ask for, full precision first."""
    series = [context.unquantized()]
    for method in METHODS:
        if method not in args.methods:
            continue
        if method == GRINQH:
            settings = sorted({*args.bits, *args.sweep})
            series.append(context.grinqh("GRINQH", flags.options(args.convert), settings, args.bits))
            for label, options in flags.variants(args):
                series.append(context.grinqh(label, options, args.bits, args.bits))
        elif method in (SKIP_INT4, TRUNCATION, WHOLE_HEAD):
            series.append(context.reread(method, flags.options(args.convert), args.bits))
        else:
            series.append(context.fixed_precision(method, args.w_bits))
    return series


def _rows(
    measurements: Measurements, series: Series, data: TextFile | ProblemFile, timing: Timing | None
) -> Iterator[Row]:
    """Yields the rows of a curve on a text or on problems, with the fields that tables and figures need."""
    if data.kind == ACCURACY:  # The settings of a sweep are measured on texts only.
        shown = tuple(bits for bits in series.settings if bits in series.shown)
        series = dataclasses.replace(series, settings=shown)
    for row in measurements.of(series, data):
        row |= {"label": series.label, "shown": row["bits"] in series.shown, "bits_read": bits_read(row)}
        if timing:
            row["kernel_us"] = timing.us(row)
        yield row


def _first_curve(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of the first GRINQH curve, by ascending bits."""
    graded = [row for row in rows if row["method"] == GRINQH]
    return [row for row in graded if row["label"] == graded[0]["label"]]


def _sweep(rows: Sequence[Row], sweep: Sequence[float]) -> dict[str, Any]:
    """Returns the steps of the dial between the settings of ``sweep``, and whether perplexity ever rises."""
    swept = [row for row in _first_curve(rows) if row["bits"] in sweep]
    steps = paired.steps(swept)
    return {
        "data": swept[0]["data"],
        "label": swept[0]["label"],
        "never_rises": not any(step["rises"] for step in steps),
        "never_rises_paired": not any(step["rises_paired"] for step in steps),
        "steps": steps,
    }


def _comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Compares GRINQH with every other method, and with a whole head with the fixed-precision methods."""
    shown = [row for row in rows if row["shown"]]
    first = _first_curve(shown)
    others = [row for row in shown if row not in first and row["method"] != UNQUANTIZED]
    (full,) = (row for row in shown if row["method"] == UNQUANTIZED)
    whole, fixed = ([row for row in shown if row["method"] in methods] for methods in ((WHOLE_HEAD,), FIXED))
    return paired.comparisons(first, others, full) + paired.comparisons(whole, fixed, full)


def _verdict(swept: Sequence[dict[str, Any]]) -> int:
    """Prints whether perplexity rises along each sweep; returns the exit code, 1 if one does."""
    for sweep in swept:
        rises = [step for step in sweep["steps"] if step["rises"]]
        small = sum(step["rises_paired"] for step in sweep["steps"])
        verdict = "never rises by more than its standard error"
        if rises:
            places = ", ".join(f"{step['from']:g} to {step['to']:g} bits" for step in rises)
            verdict = f"RISES by more than its standard error from {places}"
        print(
            f"{sweep['label']}, {sweep['data']}: over {len(sweep['steps'])} steps of the dial perplexity "
            f"{verdict}; by more than the paired standard error in {small}"
        )
    return int(not all(sweep["never_rises"] for sweep in swept))


def _redraw(args: argparse.Namespace) -> int:
    """Draws the figure of results that an earlier run wrote."""
    try:
        results = json.loads(args.draw.read_text(encoding="utf-8"))
        drawn = [(results["title"], row["data"]) for row in results["rows"] if row["shown"]]
        if not drawn:
            raise ValueError("no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--draw {args.draw}: no results of this command ({error}); name a file that --json wrote"
        ) from None
    if args.title:
        results["title"] = args.title
    picture = args.figure or args.draw.with_suffix(".png")
    figure.draw(results, picture)
    print(f"figure of {len(drawn)} rows: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
