"""Checks and times the product at one level for 16 to 512 rows on a GPU.

    python benchmarks/level_matmul.py --output level-matmul.json       everything
    python benchmarks/level_matmul.py --checks                         correctness only
    python benchmarks/level_matmul.py --rows 16 32 --levels 3          some products
    python benchmarks/level_matmul.py --tune                           also time XLA, update the tuning table
    python benchmarks/level_matmul.py --variants exact rounded         other programs

Times: kernel time of the four projections of a Qwen3-8B layer, from the profiler, over copies of the weights
that exceed the L2, beside XLA's bf16 product. "layer" is the time of all kernels; "kernels" is that of each:
of the lane program that multiplies, and of XLA's that add up partial sums. "product" is the time of the lane
program, shape by shape. Each product waits for the one before.

Checks: the kernel against float64, relative to the norm of the exact row; the same bits when it runs again.

Tuning: "xla" dequantizes a copy of each weight. For each level, the table gets the largest number of rows up
to which the kernel was faster than "xla" for every number of rows measured. For up to so many rows, decode
steps of more than 16 rows, and prompts at the highest level, then run the kernel.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import statistics

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import matvec
import numpy as np
import report as reports
import timing
from report import compile_in_order, say

from pallas_kernels import codes, level_matmul, matmul
from pallas_kernels.matmul.mosaic_gpu import kernel

CHECKED_SHAPES = ((576, 1100), (2048, 2560))
CHECKED_ROWS = (9, 16, 17, 32, 64, 130)
CHECKED_LEVELS = (1, 2, 3, 4)
TIMED_ROWS = (16, 32, 64, 128, 256, 512)
TIMED_LEVELS = (3, 4)
COPIES = 2
"""Number of copies of the layer's weights that a call reads in turn: 200 MB at level 2."""

REPEATS = 5

VARIANTS: dict[str, bool | None] = {"default": None, "exact": False, "rounded": True}
"""Whether a program of the kernel rounds weights to bfloat16, by its name."""

RELATIVE_ERROR, ROUNDED_RELATIVE_ERROR = 1e-4, 4e-3
"""Largest error of a row, with exact weights and with weights rounded to bfloat16."""

SHAPES = [tuple(map(int, shape.split("x"))) for shape in matvec.LAYER]


def draw_x(rows: int, k: int) -> jax.Array:
    """Draws Gaussian bfloat16 activations ``[rows, k]``."""
    return jnp.asarray(np.random.default_rng(k).standard_normal((rows, k)), jnp.bfloat16)


def multiply_by(variant: str, x: jax.Array, weight, level: int) -> jax.Array:
    """Returns the product by a variant, or by XLA if that is its name."""
    if variant in VARIANTS:
        return kernel.matmul(x, weight, level, VARIANTS[variant])
    return level_matmul(x, weight, level, implementation=variant)


def check(report: reports.Report, variant: str) -> None:
    """Checks a variant of the kernel; records a problem for each failure."""
    dequantize = jax.jit(codes.dequantize, static_argnums=1)
    results = report.fields.setdefault("checks", [])
    for shape in CHECKED_SHAPES:
        if report.out_of_time(f"checks of {shape[0]}x{shape[1]}"):
            return
        (weight,) = matvec.random_weights(*shape, count=1)
        functions, arguments = {}, {}
        for rows, level in itertools.product(CHECKED_ROWS, CHECKED_LEVELS):
            functions[rows, level] = functools.partial(multiply_by, variant, level=level)
            arguments[rows, level] = draw_x(rows, shape[0]), weight
        errors = []
        for (rows, level), program in compile_in_order(functions, arguments):
            x, _ = arguments[rows, level]
            w = np.asarray(dequantize(weight, level), np.float64)
            exact = np.asarray(x.astype(jnp.float32), np.float64) @ w
            y, again = np.asarray(program(x, weight)), np.asarray(program(x, weight))
            rounded = kernel.geometry_of(rows, weight, level, VARIANTS[variant]).rounded
            errors.append(float((np.linalg.norm(y - exact, axis=1) / np.linalg.norm(exact, axis=1)).max()))
            same = np.array_equal(y.view(np.uint32), again.view(np.uint32))
            result = {
                "variant": variant,
                "shape": f"{shape[0]}x{shape[1]}",
                "rows": rows,
                "level": level,
                "relative_error": errors[-1],
                "same_bits_twice": same,
            }
            results.append(result)
            if not same or not errors[-1] <= (ROUNDED_RELATIVE_ERROR if rounded else RELATIVE_ERROR):
                report.problems.append(f"check failed: {result}")
        say(f"{variant}: {shape[0]}x{shape[1]}: {len(errors)} checks, largest error {max(errors):.2e}")
        report.save()


def layer_times(function) -> tuple[dict[str, float], dict[str, float]]:
    """Profiles ``function``, which multiplies with all copies of the layer.

    Returns:
      The time of each kernel in a layer by name, us; and the median time of the program that multiplies for
      each shape that has one.
    """
    launches = timing.profile(function, REPEATS)
    kernels = {name: sum(times) / (REPEATS * COPIES) for name, times in launches.items()}
    products = {
        shape: round(statistics.median(times), 2)
        for shape in matvec.LAYER
        for name, times in launches.items()
        if f"level_matmul_{shape}_kernel" in name
    }
    return kernels, products


def one_after_another(multiply, xs: list[jax.Array], layers: list[list]) -> list[jax.Array]:
    """Returns ``multiply(x, w)`` for all copies of the layer; each product waits for the one before."""
    ys: list[jax.Array] = []
    for layer in layers:
        for x, w in zip(xs, layer, strict=True):
            if ys:
                x, ys[-1] = jax.lax.optimization_barrier((x, ys[-1]))
            ys.append(multiply(x, w))
    return ys


class LayerTimes:
    """Times products with the weights of a layer; adds the results to the report."""

    def __init__(self, report: reports.Report):
        self.report = report
        self.times = report.fields["times"] = []
        self.bf16_us = report.fields["bf16_us"] = {}
        weights = [matvec.random_weights(*shape, count=COPIES) for shape in SHAPES]
        self._weights = [list(layer) for layer in zip(*weights, strict=True)]

    @functools.cached_property
    def _bf16_weights(self) -> list[list[jax.Array]]:
        make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
        return [[make(jax.random.key(i), shape) for shape in SHAPES] for i in range(COPIES)]

    def bf16(self, rows_list: list[int]) -> None:
        """Times XLA's bf16 products."""
        for rows in rows_list:
            if self.report.out_of_time(f"{rows} rows, XLA bf16"):
                continue
            xs, start = [draw_x(rows, k) for k, _ in SHAPES], reports.elapsed()
            arguments = {rows: (xs, self._bf16_weights)}
            multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
            function = functools.partial(one_after_another, multiply)
            ((_, program),) = compile_in_order({rows: function}, arguments, threads=1)
            seconds = reports.elapsed() - start
            kernels, _ = layer_times(lambda p=program, xs=xs: p(xs, self._bf16_weights))
            layer = sum(kernels.values())
            self.bf16_us[rows] = round(layer, 2)
            say(f"{rows:3} rows XLA bf16: {layer:.1f} us a layer (compiled in {seconds:.1f} s)")
            for result in self.times:
                if result["rows"] == rows:
                    result["of_bf16"] = round(result["layer_us"] / layer, 3)
                    name = f"{rows:3} rows level {result['level']} {result['variant']:32}"
                    say(f"{name} {result['layer_us']:6.1f} us, {result['of_bf16']:.2f} of bf16")
            self.report.save()

    def products(self, rows_list: list[int], levels: list[int], variant: str) -> None:
        """Times a variant, or XLA, at all combinations of rows and levels."""
        if self.report.out_of_time(f"{variant}, rows {rows_list}, levels {levels}"):
            return
        xs = {rows: [draw_x(rows, k) for k, _ in SHAPES] for rows in rows_list}
        functions = {}
        for level, rows in itertools.product(levels, rows_list):
            multiply = functools.partial(multiply_by, variant, level=level)
            functions[rows, level] = functools.partial(one_after_another, multiply)
        arguments = {(rows, level): (xs[rows], self._weights) for rows, level in functions}
        # XLA times its algorithms for a product while it compiles, so it must be alone.
        threads = reports.COMPILING_THREADS if variant in VARIANTS else 1
        for (rows, level), program in compile_in_order(functions, arguments, threads=threads):
            if self.report.out_of_time(f"{rows} rows, level {level}, {variant}"):
                continue
            kernels, products = layer_times(lambda p=program, rows=rows: p(xs[rows], self._weights))
            layer = sum(kernels.values())
            result = {
                "rows": rows,
                "level": level,
                "variant": variant,
                "layer_us": round(layer, 2),
                "kernels_us": {name: round(us, 2) for name, us in kernels.items()},
                "product_us": products,
            }
            line = f"{rows:3} rows level {level} {variant:32} {layer:6.1f} us a layer"
            if rows in self.bf16_us:
                result["of_bf16"] = round(layer / self.bf16_us[rows], 3)
                line += f", {result['of_bf16']:.2f} of bf16"
            if products:
                line += f"; products {sum(products.values()):6.1f} us: {products}"
            say(line)
            self.times.append(result)
            self.report.save()


def tuning_table(times: list[dict]) -> dict[str, int]:
    """Returns the largest number of rows, by level, up to which the kernel is faster than XLA.

    Args:
      times: Results of ``LayerTimes``. Numbers of rows that lack one of the implementations do not count.
    """
    layers = {(t["level"], t["rows"], t["variant"]): t["layer_us"] for t in times}
    table = {}
    for level in sorted({t["level"] for t in times}):
        most_rows = 0
        for rows in sorted({t["rows"] for t in times}):
            pair = [layers.get((level, rows, name)) for name in ("default", "xla")]
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
    say(f"{path}: {device}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="only check, do not time")
    parser.add_argument("--times", action="store_true", help="only time, do not check")
    parser.add_argument("--rows", nargs="+", type=int, default=list(TIMED_ROWS), metavar="N")
    parser.add_argument("--levels", nargs="+", type=int, default=list(TIMED_LEVELS), metavar="N")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"], metavar="NAME")
    parser.add_argument("--tune", action="store_true", help="write the times into the tuning table")
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args)
    if not args.checks:
        times = LayerTimes(report)
        for variant in args.variants:
            times.products(args.rows, args.levels, variant)
        times.bf16(args.rows)
    if not args.times:
        for variant in args.variants:
            check(report, variant)
    if args.tune and not args.checks:
        for rows in args.rows:
            times.products([rows], args.levels, "xla")
        if report.fields["skipped"]:
            say("the tuning table is unchanged, because products were skipped")
        else:
            update_table(times.times, pathlib.Path(matmul.__file__).with_name("measured.json"))
    report.finish()


if __name__ == "__main__":
    main()
