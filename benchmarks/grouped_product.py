"""Checks and times the product of many rows with the kernels of their experts on a GPU.

    python benchmarks/grouped_product.py --output grouped.json

A shape is experts x input channels x outputs x rows. Rows choose their experts evenly, or all of them among
the first eight. Times are of all kernels of a product, from the profiler: the launch, and XLA's kernels that
group the rows.
"""

import argparse
import itertools
import os
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import report as reports
import timing
from report import say

from pallas_kernels.experts import grouped
from pallas_kernels.experts.batches import batch_rows, map_batches
from pallas_kernels.experts.grouped import Tiling

SHAPES = ("128x2048x1536x16384", "128x768x2048x16384", "128x2048x1536x4096")
"""Gate and up, and down, of Qwen3-30B-A3B for prompts of 2,048 and 512 tokens."""

VARIANTS = {
    "128x128, 3 steps": Tiling(128, 128, 3),
    "128x128, 5 steps": Tiling(128, 128, 5),
    "64x128, 4 steps": Tiling(64, 128, 4),
    "64x256, 3 steps": Tiling(64, 256, 3),
    "128x192, 3 steps": Tiling(128, 192, 3),
}

BATCHES = "batches"
"""Products of batches with equally many rows of every expert, by XLA (see ``experts.batches``)."""

REPEATS = 5
MOST_ERROR = 1e-5


def draw(shape: str, even: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns rows, kernels and experts."""
    experts, k, n, rows = map(int, shape.split("x"))
    keys = jax.random.split(jax.random.key(rows), 3)
    kernel = jax.random.normal(keys[0], (experts, k, n), jnp.bfloat16)
    x = jax.random.normal(keys[1], (rows, k), jnp.bfloat16)
    return x, kernel, jax.random.randint(keys[2], (rows,), 0, experts if even else 8)


def product(name: str, num_experts: int) -> Callable[..., jax.Array]:
    """Returns the function of a variant: rows, kernels and experts -> products."""
    if name == BATCHES:

        def batches(x, kernel, experts):
            return map_batches(
                lambda batch: jnp.einsum("eck,ekn->ecn", batch, kernel, preferred_element_type=jnp.float32),
                x,
                experts,
                num_experts=num_experts,
                capacity=batch_rows(len(x), num_experts),
            )

        return batches
    return lambda x, kernel, experts: grouped.grouped_product(
        x, kernel, experts, num_experts, sizes=VARIANTS[name]
    )


def largest_error(y: jax.Array, x: jax.Array, kernel: jax.Array, experts: jax.Array) -> float:
    """Returns the largest relative error of some rows, against NumPy in float64."""
    worst = 0.0
    for row in range(0, len(x), 997):
        exact = np.asarray(x[row], np.float64) @ np.asarray(kernel[experts[row]], np.float64)
        worst = max(worst, float(np.linalg.norm(y[row] - exact) / np.linalg.norm(exact)))
    return worst


def measure(program: Callable[..., jax.Array], arguments: tuple, entry: dict, report: reports.Report) -> None:
    """Checks and times a program, and adds the results to its entry."""
    entry["largest_error"] = largest_error(program(*arguments), *arguments)
    if not entry["largest_error"] < MOST_ERROR:
        report.problems.append(f"check failed: {entry}")
    durations = timing.profile(lambda: program(*arguments), REPEATS)
    sums = {kernel: sum(times) / REPEATS for kernel, times in durations.items()}
    entry["us"] = round(sum(sums.values()), 1)
    largest = sorted(sums, key=sums.__getitem__, reverse=True)[:4]
    entry["largest_kernels_us"] = {kernel[:60]: round(sums[kernel], 1) for kernel in largest}
    report.fields["times"].append(entry)
    say(str(entry))
    report.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ExKxNxR")
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args, times=[])
    for shape in args.shapes:
        names = [name for name, sizes in VARIANTS.items() if int(shape.split("x")[2]) % sizes.tile == 0]
        functions = {name: jax.jit(product(name, int(shape.split("x")[0]))) for name in (*names, BATCHES)}
        arguments = {even: draw(shape, even) for even in (True, False)}
        programs = reports.compile_all(functions, dict.fromkeys(functions, arguments[True]))
        for even, name in itertools.product(arguments, programs):
            if not report.out_of_time(f"{shape}, {name}"):
                entry = {"shape": shape, "even": even, "variant": name}
                measure(programs[name], arguments[even], entry, report)
    report.finish()


if __name__ == "__main__":
    main()
