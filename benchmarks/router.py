"""Times the router of a mixture of experts on a GPU, beside XLA's, and checks it against float64.

    python benchmarks/router.py --output router.json
    python benchmarks/router.py --shapes 2048x128x8 --rows 1 16

A shape is input channels x experts x chosen experts. Checks come first, then the times of all shapes for one
row, then for more rows. Times are medians from the profiler, of all kernels of a call for XLA, over routers
that rotate through several times the L2. A program calls ``GROUP`` routers, and runs with each group of them.
"""

import argparse
import functools
import itertools
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import report as reports
import timing
from report import compile_all, say

from pallas_kernels import Activations, router

SHAPES = ("2048x128x8", "4096x128x8", "2048x60x4", "4096x8x2", "2048x512x10")
"""Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen1.5-MoE-A2.7B, Mixtral-8x7B, Qwen3-Next-80B-A3B."""

ROTATED_BYTES = 250e6
MOST_ROUTERS = 400
GROUP = 20
"""Number of routers of a program. Compiling hundreds took XLA 30 s."""

MOST_ERROR = 1e-4
Shape = tuple[int, int, int]
EPS = 1e-6


def of_xla(x: Activations, kernel: jax.Array, chosen: int) -> tuple[jax.Array, jax.Array]:
    """Returns experts and probabilities as ``model.experts.Router`` computes them without the kernel."""
    scores = jnp.matmul(x.array, kernel, preferred_element_type=jnp.float32)
    probabilities, experts = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), chosen)
    return experts, probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)


def of_kernel(x: Activations, kernel: jax.Array, chosen: int) -> tuple[jax.Array, jax.Array]:
    """Returns experts and probabilities of the kernel."""
    routed = router.route(x, kernel, chosen, normalized=True)
    return routed.experts, routed.probabilities


def draw(shape: Shape, rows: int) -> tuple[Activations, jax.Array]:
    """Draws activations and the kernel of a router."""
    features, experts, chosen = shape
    keys = jax.random.split(jax.random.key(rows), 3)
    kernel = 2 * features**-0.5 * jax.random.normal(keys[2], (features, experts))
    values = jax.random.normal(keys[0], (rows, 1, features), jnp.bfloat16)
    x = Activations.of(values, jax.random.uniform(keys[1], (rows, 1, 8)) / 4, EPS)
    kernel = kernel.astype(jnp.bfloat16)
    if (reason := router.supports(x, kernel, chosen)) is not None:
        sys.exit(f"{features}x{experts}x{chosen}, {rows} rows: the kernel {reason}")
    return x, kernel


def largest_error(experts, probabilities, x: Activations, kernel: jax.Array, chosen: int) -> float:
    """Returns the largest error of a probability; infinity if an expert is not one of the largest scores'."""
    experts, probabilities = np.asarray(experts)[:, 0], np.asarray(probabilities)[:, 0]
    squares = np.asarray(x.square_partials, np.float64).sum(-1) + EPS
    values = np.asarray(x.stored_values.astype(jnp.float32), np.float64)[:, 0] / np.sqrt(squares)
    scores = values @ np.asarray(kernel.astype(jnp.float32), np.float64)
    best = np.sort(scores, axis=1)[:, ::-1][:, :chosen]
    mine = np.take_along_axis(scores, experts, 1)
    if np.abs(mine - best).max() > 1e-4 or any(len(set(row)) < chosen for row in experts):
        return float("inf")
    exact = np.exp(best - best.max(1, keepdims=True))
    return float(np.abs(probabilities - exact / exact.sum(1, keepdims=True)).max())


def check(cases: list[tuple[int, Shape]], report: reports.Report) -> None:
    """Checks the kernel; records a problem for each failure."""
    arguments = {(rows, shape): draw(shape, rows) for rows, shape in cases}
    functions = {case: lambda x, kernel, chosen=case[1][2]: of_kernel(x, kernel, chosen) for case in cases}
    for (rows, shape), program in compile_all(functions, arguments).items():
        x, kernel = arguments[rows, shape]
        error = largest_error(*program(x, kernel), x, kernel, shape[2])
        result = {"shape": "x".join(map(str, shape)), "rows": rows, "largest_error": error}
        report.fields["checks"].append(result)
        if not error < MOST_ERROR:
            report.problems.append(f"check failed: {result}")
        say(f"check: {result}")
    report.save()


def measure(cases: list[tuple[int, Shape]], report: reports.Report) -> None:
    """Times shapes for one number of rows: the kernel, then XLA."""
    rows = cases[0][0]
    arguments, functions = {}, {}
    for case in cases:
        x, kernel = draw(case[1], rows)
        arguments[case] = x, [kernel] * GROUP
        for name, function in (("kernel", of_kernel), ("xla", of_xla)):
            functions[name, case] = lambda x, kernels, f=function, chosen=case[1][2]: [
                f(x, kernel, chosen) for kernel in kernels
            ]
    mine = {case: functions["kernel", case] for case in cases}
    programs = compile_all(mine, arguments)
    for case in cases:
        name = "x".join(map(str, case[1]))
        if report.out_of_time(f"{name}, {rows} rows"):
            continue
        features, experts, _ = case[1]
        groups = min(MOST_ROUTERS, max(GROUP, round(ROTATED_BYTES / (features * experts * 2)))) // GROUP
        x, (kernel, *_) = arguments[case]
        # The values do not matter for the time, the places in memory do.
        kernels = [[jnp.copy(kernel) for _ in range(GROUP)] for _ in range(groups)]

        def run(program, x=x, kernels=kernels):
            return [program(x, group) for group in kernels]

        durations = timing.profile(functools.partial(run, programs[case]))
        launches = [d for kernel, ds in durations.items() if "router_kernel" in kernel for d in ds]
        times = timing.Times.of(launches)
        result = {"shape": name, "rows": rows, "kernel_us": round(times.median, 3)}
        result["kernel_quartiles_us"] = [round(q, 3) for q in times.quartiles]
        # XLA autotunes its product on the GPU, so its programs do not compile in parallel.
        xla = compile_all({case: functions["xla", case]}, arguments, threads=1)[case]
        durations = timing.profile(functools.partial(run, xla))
        result["xla_us"] = round(sum(sum(ds) for ds in durations.values()) / (5 * groups * GROUP), 3)
        report.fields["router"].append(result)
        say(str(result))
        report.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="DxExC", help="default: published models"
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 4, 16], metavar="N", help="default: 1 4 16"
    )
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args, checks=[], router=[])
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    check(list(itertools.product(args.rows, shapes)), report)
    for rows in args.rows:
        measure([(rows, shape) for shape in shapes], report)
    report.finish()


if __name__ == "__main__":
    main()
