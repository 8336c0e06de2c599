"""Times the graded matvec of windows of text, 16 to 1024 rows, as evaluation multiplies, on a GPU.

    python benchmarks/graded_windows.py --output windows.json
    python benchmarks/graded_windows.py --rows 16 64

Kernel time of the four projections of a Qwen3-8B layer at 3 bits, from the profiler. "mosaic_gpu" launches
the kernel for each 16 rows, "xla" multiplies the digits of all planes in float32. Each row must have the same
bits in a window as alone.
"""

import argparse
import datetime
import json
import os
import pathlib
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import matvec
import numpy as np
import timing
from rows import draw_x

from pallas_kernels import graded_matvec
from pallas_kernels.matvec import Implementation

ROWS = (16, 32, 64, 256, 1024)
BITS = 3
IMPLEMENTATIONS: tuple[Implementation, ...] = ("mosaic_gpu", "xla")
REPEATS = 3

SHAPES = [tuple(map(int, shape.split("x"))) for shape in matvec.LAYER]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="N")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    weights = [matvec.random_weights(*shape, count=1)[0] for shape in SHAPES]
    times, problems = [], []
    for rows in args.rows:
        xs = [draw_x(rows, k, "correlated", seed=k) for k, _ in SHAPES]
        limits = [jnp.asarray(matvec.thresholds_for(x, BITS)) for x in xs]
        xs = [jnp.asarray(x) for x in xs]
        for name in IMPLEMENTATIONS:

            @jax.jit
            def layer(xs, limits, weights, name=name):
                arguments = zip(xs, weights, limits, strict=True)
                return [graded_matvec(x, w, t, implementation=name)[0] for x, w, t in arguments]

            durations = timing.profile(
                lambda layer=layer, xs=xs, limits=limits: layer(xs, limits, weights), REPEATS
            )
            us = sum(map(sum, durations.values())) / REPEATS
            times.append({"rows": rows, "implementation": name, "layer_us": round(us, 1)})
            print(f"{rows:4} rows {name:10} {us:9.1f} us a layer, {us / rows:6.2f} us a row", flush=True)
            if name == "mosaic_gpu":
                last = [x[-1:] for x in xs], [t[-1:] for t in limits]
                together, alone = layer(xs, limits, weights), layer(*last, weights)
                if not all(np.array_equal(a[-1:], b) for a, b in zip(together, alone, strict=True)):
                    problems.append(f"{rows} rows: the last row has other bits alone")
    report = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: matvec.version(name) for name in ("jax", "jaxlib", "numpy")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "times": times,
        "problems": problems,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
