"""Checks and times the product at one level for 16 to 512 rows on a GPU.

    python benchmarks/level_matmul.py --output level-matmul.json       everything
    python benchmarks/level_matmul.py --checks                         correctness only
    python benchmarks/level_matmul.py --rows 16 32 --levels 3          some products
    python benchmarks/level_matmul.py --tune                           also update the tuning table

Checks: every implementation against float64, relative to the norm of the exact row; and the same bits when it
runs again.

Times: kernel time of the four projections of a Qwen3-8B layer, from the profiler, over copies of the weights
that exceed the L2, beside XLA's bf16 product. "layer" is the time of all kernels, also of those that prepare
the activations and add up partial sums; "product" is that of the lane program alone, shape by shape. "xla"
dequantizes a copy of each weight.

Tuning: for each level, the table gets the largest number of rows up to which the kernel was faster than "xla"
for every number of rows measured. For up to so many rows, decode steps of more than 16 rows, and prompts at
the highest level, then run the kernel.
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import matvec
import numpy as np
import timing
from rows import compiled

from pallas_kernels import codes, level_matmul, matmul
from pallas_kernels.matmul import LevelImplementation

IMPLEMENTATIONS: tuple[LevelImplementation, ...] = ("mosaic_gpu", "xla")
CHECKED_SHAPES = ((576, 1100), (2048, 2560), (1152, 4096))
CHECKED_ROWS = (9, 16, 32, 64, 130, 256)
CHECKED_LEVELS = (1, 2, 3, 4)
TIMED_ROWS = (16, 32, 64, 128, 256, 512)
TIMED_LEVELS = (2, 3, 4)
COPIES = 4
"""Number of copies of the layer's weights that a call reads in turn: 400 MB at level 2."""

KERNEL_NAME = "level_matmul_kernel"

RELATIVE_ERROR = {"mosaic_gpu": 1e-4, "xla": 5e-3}
"""Largest error of a row. XLA multiplies weights that are rounded to bfloat16."""

SHAPES = [tuple(map(int, shape.split("x"))) for shape in matvec.LAYER]


def draw_x(rows: int, k: int) -> jax.Array:
    """Draws Gaussian bfloat16 activations ``[rows, k]``."""
    return jnp.asarray(np.random.default_rng(k).standard_normal((rows, k)), jnp.bfloat16)


def check(problems: list[str]) -> list[dict]:
    """Checks all implementations; appends a line for each failure."""
    weights = {shape: matvec.random_weights(*shape, count=1)[0] for shape in CHECKED_SHAPES}
    functions, arguments = {}, {}
    products = itertools.product(CHECKED_SHAPES, CHECKED_ROWS, CHECKED_LEVELS, IMPLEMENTATIONS)
    for shape, rows, level, implementation in products:
        key = shape, rows, level, implementation
        functions[key] = lambda x, w, level=level, name=implementation: level_matmul(
            x, w, level, implementation=name
        )
        arguments[key] = draw_x(rows, shape[0]), weights[shape]
    results = []
    for (shape, rows, level, implementation), program in compiled(functions, arguments).items():
        x, weight = draw_x(rows, shape[0]), weights[shape]
        w = codes.dequantize(weight, level)  # exact in float32
        with jax.enable_x64(True):
            exact = np.asarray(x.astype(jnp.float64) @ w.astype(jnp.float64))
        y, again = np.asarray(program(x, weight)), np.asarray(program(x, weight))
        error = float((np.linalg.norm(y - exact, axis=1) / np.linalg.norm(exact, axis=1)).max())
        same = np.array_equal(y.view(np.uint32), again.view(np.uint32))
        result = {
            "shape": f"{shape[0]}x{shape[1]}",
            "rows": rows,
            "level": level,
            "implementation": implementation,
            "relative_error": error,
            "same_bits_twice": same,
        }
        results.append(result)
        if not same or not error <= RELATIVE_ERROR[implementation]:
            problems.append(f"check failed: {result}")
    for name in IMPLEMENTATIONS:
        errors = [r["relative_error"] for r in results if r["implementation"] == name]
        print(f"{name}: {len(errors)} checks, largest error {max(errors):.2e}", flush=True)
    return results


def layer_times(function, products: int) -> tuple[float, list[float]]:
    """Profiles ``function``, which multiplies with all copies of the layer.

    Returns:
      The time of all kernels of a layer, us, and the median time of the lane program for each shape; an empty
      list if its launches do not come in the order of the shapes.
    """
    repeats = 5
    events = timing.profile_events(function, repeats)
    mine = [(details, us) for name, details, us in events if KERNEL_NAME in name]
    medians = []
    if len(mine) == repeats * products:
        launches = [mine[i :: len(SHAPES)] for i in range(len(SHAPES))]
        if all(len({details for details, _ in of_shape}) == 1 for of_shape in launches):
            medians = [round(statistics.median(us for _, us in of_shape), 2) for of_shape in launches]
    return sum(us for _, _, us in events) / (repeats * COPIES), medians


def bf16_function(xs, weights):
    """Multiplies with all copies of the layer in bfloat16; the results are float32."""
    return [
        jnp.matmul(x, w, preferred_element_type=jnp.float32)
        for layer in weights
        for x, w in zip(xs, layer, strict=True)
    ]


def time_bf16(rows_list: list[int]) -> dict[int, float]:
    """Returns the kernel time of XLA's bf16 products of a layer, us, by the number of rows."""
    keys = [jax.random.key(i) for i in range(COPIES)]
    weights = [[jax.random.normal(key, shape, jnp.bfloat16) for shape in SHAPES] for key in keys]
    run, times = jax.jit(bf16_function), {}
    for rows in rows_list:
        xs = [draw_x(rows, k) for k, _ in SHAPES]
        times[rows] = round(layer_times(lambda xs=xs: run(xs, weights), 0)[0], 2)
        print(f"{rows:3} rows XLA bf16: {times[rows]:.1f} us a layer", flush=True)
    return times


def time_layer(
    rows_list: list[int], levels: list[int], bf16: dict[int, float], deadline: float, problems: list[str]
) -> list[dict]:
    """Times all implementations; stops before the deadline (``time.monotonic``)."""
    weights = {shape: matvec.random_weights(*shape, count=COPIES) for shape in SHAPES}
    results: list[dict] = []
    for rows in rows_list:
        xs = [draw_x(rows, k) for k, _ in SHAPES]
        functions = {}
        for key in itertools.product(levels, IMPLEMENTATIONS):

            def run(xs, weights, level=key[0], name=key[1]):
                return [
                    level_matmul(x, weights[shape][i], level, implementation=name)
                    for i in range(COPIES)
                    for x, shape in zip(xs, SHAPES, strict=True)
                ]

            functions[key] = run
        start = time.monotonic()
        programs = compiled(functions, dict.fromkeys(functions, (xs, weights)))
        print(f"{rows:3} rows: compiled in {time.monotonic() - start:.1f} s", flush=True)
        for (level, name), program in programs.items():
            if time.monotonic() > deadline:
                problems.append(f"out of time before {rows} rows, level {level}, {name}")
                return results
            layer, products = layer_times(lambda p=program, xs=xs: p(xs, weights), COPIES * len(SHAPES))
            results.append(
                {
                    "rows": rows,
                    "level": level,
                    "implementation": name,
                    "layer_us": round(layer, 2),
                    "product_us": dict(zip(matvec.LAYER, products, strict=False)),
                    "of_bf16": round(layer / bf16[rows], 3),
                }
            )
            print(
                f"{rows:3} rows level {level} {name:10} {layer:6.1f} us a layer,",
                f"{layer / bf16[rows]:.2f} of bf16;",
                f"products {sum(products):6.1f} us: {products}" if products else "",
                flush=True,
            )
    return results


def tuning_table(times: list[dict]) -> dict[str, int]:
    """Returns the largest number of rows, by level, up to which the kernel is faster than XLA.

    Args:
      times: Results of ``time_layer``. Numbers of rows that lack one of the implementations do not count.
    """
    layers = {(t["level"], t["rows"], t["implementation"]): t["layer_us"] for t in times}
    table = {}
    for level in sorted({t["level"] for t in times}):
        most_rows = 0
        for rows in sorted({t["rows"] for t in times}):
            pair = [layers.get((level, rows, name)) for name in ("mosaic_gpu", "xla")]
            if None in pair or pair[0] >= pair[1]:
                break
            most_rows = rows
        table[str(level)] = most_rows
    return table


def update_table(times: list[dict], path: pathlib.Path) -> None:
    """Writes this device's table into the file of ``matmul.tuning``; keeps levels that were not measured."""
    tables = json.loads(path.read_text())
    device = tables.setdefault(jax.devices()[0].device_kind, {})
    device.update(tuning_table(times))
    path.write_text(json.dumps(tables, indent=1) + "\n")
    print(f"{path}: {device}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="only check, do not time")
    parser.add_argument("--times", action="store_true", help="only time, do not check")
    parser.add_argument("--rows", nargs="+", type=int, default=list(TIMED_ROWS), metavar="N")
    parser.add_argument("--levels", nargs="+", type=int, default=list(TIMED_LEVELS), metavar="N")
    parser.add_argument("--seconds", type=float, default=240, help="stop timing after this many seconds")
    parser.add_argument("--tune", action="store_true", help="write the times into the tuning table")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    start, problems = time.monotonic(), []
    report = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: matvec.version(name) for name in ("jax", "jaxlib", "numpy")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "problems": problems,
    }

    def save() -> None:
        report["seconds"] = round(time.monotonic() - start)
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n")

    if not args.times:
        report["checks"] = check(problems)
        save()
    if not args.checks:
        report["bf16_us"] = time_bf16(args.rows)
        report["times"] = time_layer(
            args.rows, args.levels, report["bf16_us"], start + args.seconds, problems
        )
        if args.tune:
            update_table(report["times"], pathlib.Path(matmul.__file__).with_name("measured.json"))
    save()
    print(f"{report['seconds']} s")
    if problems:
        sys.exit("\n".join(problems[:20]))


if __name__ == "__main__":
    main()
