"""Times the graded matvec of windows of text, 16 to 1024 rows, as evaluation multiplies, on a GPU.

    python benchmarks/graded_windows.py --output windows.json
    python benchmarks/graded_windows.py --rows 16 64

Kernel time of the four projections of a Qwen3-8B layer at 3 bits, from the profiler. "mosaic_gpu" launches
the kernel for each 16 rows, "xla" multiplies the digits of all planes in float32. Each row must have the same
bits in a window as alone.
"""

import argparse
import functools
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import matvec
import numpy as np
import report as reports
import timing
from report import compile_all, say
from rows import draw_x

from pallas_kernels import graded_matvec
from pallas_kernels.matvec import Implementation

ROWS = (16, 32, 64, 256, 1024)
BITS = 3
IMPLEMENTATIONS: tuple[Implementation, ...] = ("mosaic_gpu", "xla")
REPEATS = 3

SHAPES = [tuple(map(int, shape.split("x"))) for shape in matvec.LAYER]


def layer(xs, limits, weights, implementation: Implementation) -> list[jax.Array]:
    """Multiplies with the four projections."""
    arguments = zip(xs, weights, limits, strict=True)
    return [graded_matvec(x, w, t, implementation=implementation)[0] for x, w, t in arguments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="N")
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args, times=[])
    weights = [matvec.random_weights(*shape, count=1)[0] for shape in SHAPES]
    arguments = {}
    for rows in {1, *args.rows}:
        xs = [draw_x(rows, k, "correlated", seed=k) for k, _ in SHAPES]
        limits = [jnp.asarray(matvec.thresholds_for(x, BITS)) for x in xs]
        arguments[rows] = [jnp.asarray(x) for x in xs], limits, weights
    for name in IMPLEMENTATIONS:  # XLA's products are autotuned on the GPU, so they compile one by one.
        functions = dict.fromkeys(arguments, functools.partial(layer, implementation=name))
        programs = compile_all(
            functions, arguments, threads=1 if name == "xla" else reports.COMPILING_THREADS
        )
        for rows in args.rows:
            if report.out_of_time(f"{rows} rows, {name}"):
                continue
            call = functools.partial(programs[rows], *arguments[rows])
            if name == "mosaic_gpu":
                xs, limits, _ = arguments[rows]
                alone = programs[1]([x[-1:] for x in xs], [t[-1:] for t in limits], weights)
                if not all(np.array_equal(a[-1:], b) for a, b in zip(call(), alone, strict=True)):
                    report.problems.append(f"{rows} rows: the last row has other bits alone")
            us = sum(map(sum, timing.profile(call, REPEATS).values())) / REPEATS
            report.fields["times"].append({"rows": rows, "implementation": name, "layer_us": round(us, 1)})
            say(f"{rows:4} rows {name:10} {us:9.1f} us a layer, {us / rows:6.2f} us a row")
            report.save()
    report.finish()


if __name__ == "__main__":
    main()
