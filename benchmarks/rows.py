"""Checks and times the graded matvec for 2 to 16 activation rows on a GPU.

    python benchmarks/rows.py --output rows.json                       everything
    python benchmarks/rows.py --checks --output checks.json            correctness and batch invariance only
    python benchmarks/rows.py --variants "pairs, 8 slots" default      some programs
    python benchmarks/rows.py --rows 8 16 4                            some numbers of rows

Checks: every row against float64 at several mean bits, for Gaussian and for Cauchy-like activations; each row
has the same bits as the row alone (which runs the kernel for one row), in batches of 2 to 16 rows, with other
companions, and in every variant.

Times: kernel time of the four projections of a Qwen3-8B layer, from the profiler, over copies of the weights
that exceed the L2, beside XLA's bf16 product. Activations are independent ("random"), or their magnitudes are
correlated over rows as much as in a trained model ("correlated"): the union of 2, 4, 8 and 16 rows of 3 bits
then has 3.9, 4.6, 5.1 and 5.6 bits, where trained models have 3.95, 4.6, 5.0 and 5.4.
"""

import argparse
import itertools
import os
import statistics
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import matvec
import numpy as np
import timing
from report import Report, add_arguments, compile_all, say
from rows_checks import check
from rows_programs import VARIANTS, Program, config_of, draw_x, takes

from pallas_kernels import Activations
from pallas_kernels.matvec.mosaic_gpu import kernel

TIMED_ROWS = (8, 16, 4, 2, 1)
"""Numbers of rows, the most important first."""

COPIES = 6
"""Number of copies of the layer's weights that a call reads in turn: 450 MB at 3 bits."""


def kernel_times(function) -> tuple[float, dict[str, float]]:
    """Profiles ``function``, which multiplies with all copies of the layer.

    Returns:
      The time of all kernels of a layer, us, and the median of each shape, if the launches of the kernel come
      in the order of the shapes; else the medians by launch parameters.
    """
    repeats = 5
    events = timing.profile_events(function, repeats)
    total = sum(duration for _, _, duration in events) / (repeats * COPIES)
    mine = [(details, us) for name, details, us in events if matvec.KERNEL_NAME in name]
    count = len(matvec.LAYER)
    groups = {shape: mine[i::count] for i, shape in enumerate(matvec.LAYER)}
    in_order = len(mine) == repeats * COPIES * count
    if not in_order or any(len({details for details, _ in group}) != 1 for group in groups.values()):
        groups = {}
        for launch in mine:
            groups.setdefault(launch[0], []).append(launch)
    return total, {name: round(statistics.median(us for _, us in group), 3) for name, group in groups.items()}


def time_layer(names: list[str], timed_rows: list[int], report: Report) -> None:
    """Times the named variants until the time is up, and adds the times to the report."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in matvec.LAYER]
    weights = {shape: matvec.random_weights(*shape, count=COPIES) for shape in shapes}
    results = report.fields["times"] = []
    for rows in timed_rows:
        data = {}
        for kind in ("random", "correlated"):
            xs = [draw_x(rows, k, kind, seed=k) for k, _ in shapes]
            limits = [matvec.thresholds_for(x, 3) for x in xs]
            data[kind] = [jnp.asarray(x) for x in xs], [jnp.asarray(t) for t in limits]
        variants = [name for name in names if takes(VARIANTS[name], rows)]
        functions = {
            variant: layer_function(shapes, weights, VARIANTS[variant], rows) for variant in variants
        }
        start = time.monotonic()
        programs = compile_all(functions, dict.fromkeys(variants, (*data["random"], weights)))
        print(f"{rows:2} rows: compiled in {time.monotonic() - start:.1f} s", flush=True)
        for (variant, program), (kind, (xs, limits)) in itertools.product(programs.items(), data.items()):
            if report.out_of_time(f"{rows} rows, {variant}, {kind}"):
                return
            us, medians = kernel_times(lambda p=program, xs=xs, limits=limits: p(xs, limits, weights))
            read = sum(
                matvec.bytes_read(np.asarray(x), np.asarray(t), k, n)
                for x, t, (k, n) in zip(xs, limits, shapes, strict=True)
            )
            results.append(
                {"rows": rows, "variant": variant, "x": kind, "layer_us": round(us, 2), "bytes": read}
                | {"kernel_us": medians}
            )
            print(
                f"{rows:2} rows {kind:10} {variant:22} {us:6.1f} us a layer, {read / us / 1e6:.2f} TB/s",
                list(medians.values()),
                flush=True,
            )
        report.save()


def layer_function(shapes, weights, program: Program | None, rows: int):
    """Returns a function that multiplies with all copies of the layer's weights."""
    configs = []
    for k, n in shapes:
        x = jax.eval_shape(Activations.of, jax.ShapeDtypeStruct((1, k), jnp.float32))
        base = kernel.geometry_of(x, weights[k, n][0]).config
        configs.append(None if program is None else config_of(base, program, rows, weights[k, n][0]))

    def run(xs, limits, weights):
        return [
            kernel.partial_sums(Activations.of(x), weights[shape][i], t, config=config)
            for i in range(COPIES)
            for x, t, shape, config in zip(xs, limits, shapes, configs, strict=True)
        ]

    return run


def bf16_layer(timed_rows: list[int]) -> dict[int, float]:
    """Returns the kernel time of XLA's bf16 products of a layer, us, by the number of rows."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in matvec.LAYER]
    weights = [
        [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for shape in shapes] for i in range(COPIES)
    ]
    times = {}
    for rows in timed_rows:
        xs = [jnp.ones((rows, k), jnp.bfloat16) for k, _ in shapes]
        run = jax.jit(lambda xs, ws: [x @ w for layer in ws for x, w in zip(xs, layer, strict=True)])
        times[rows] = round(kernel_times(lambda run=run, xs=xs: run(xs, weights))[0], 2)
        print(f"{rows:2} rows XLA bf16: {times[rows]:.1f} us a layer", flush=True)
    return times


def table(results: list[dict], bf16: dict[int, float]) -> None:
    """Prints the best variant of each number of rows, and the best of each shape, beside bf16."""
    print("\nrows  x            best variant for the layer    us  of bf16   best of each shape, us")
    for rows, kind in itertools.product(sorted({r["rows"] for r in results}), ("random", "correlated")):
        mine = [r for r in results if r["rows"] == rows and r["x"] == kind]
        if not mine:
            continue
        best = min(mine, key=lambda r: r["layer_us"])
        ratio = f"{best['layer_us'] / bf16[rows]:.2f}" if bf16.get(rows) else ""
        line = f"{rows:4}  {kind:11}  {best['variant']:22} {best['layer_us']:9.1f}  {ratio:7}"
        if all(shape in r["kernel_us"] for r in mine for shape in matvec.LAYER):
            of_shape = {s: min(mine, key=lambda r, s=s: r["kernel_us"][s]) for s in matvec.LAYER}
            total = sum(r["kernel_us"][s] for s, r in of_shape.items())
            line += f"  {total:5.1f}: " + ", ".join(
                f"{s} {r['kernel_us'][s]:.2f} ({r['variant']})" for s, r in of_shape.items()
            )
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="only check, do not time")
    parser.add_argument("--times", action="store_true", help="only time, do not check")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        default=TIMED_ROWS,
        metavar="N",
        help="numbers of rows, in the order of their times",
    )
    add_arguments(parser)
    args = parser.parse_args()
    report = Report(args)
    if not args.times:
        report.fields["checks"] = check(args.variants, args.rows, report.problems)
        say(f"checks are done, {len(report.problems)} problems")
        report.save()
    if not args.checks:
        report.fields["bf16_us"] = bf16_layer(args.rows)
        time_layer(args.variants, args.rows, report)
        table(report.fields["times"], report.fields["bf16_us"])
    report.finish()


if __name__ == "__main__":
    main()
