"""Times the router of a mixture of experts on a GPU, beside XLA's, and checks it against float64.

    python benchmarks/router.py --output router.json
    python benchmarks/router.py --shapes 2048x128x8 --rows 1 16

A shape is input channels x experts x chosen experts. Times are medians from the profiler, of all kernels of a
call for XLA, over routers that rotate through several times the L2.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import timing

from pallas_kernels import Activations, router

SHAPES = ("2048x128x8", "4096x128x8", "2048x60x4", "4096x8x2", "2048x512x10")
"""Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen1.5-MoE-A2.7B, Mixtral-8x7B, Qwen3-Next-80B-A3B."""

ROTATED_BYTES = 250e6
MOST_ROUTERS = 400
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


def largest_error(x: Activations, kernel: jax.Array, chosen: int) -> float:
    """Returns the largest error of a probability; infinity if an expert is not one of the largest scores'."""
    experts, probabilities = (
        np.asarray(a)[:, 0] for a in jax.jit(of_kernel, static_argnums=2)(x, kernel, chosen)
    )
    squares = np.asarray(x.square_partials, np.float64).sum(-1) + EPS
    values = np.asarray(x.stored_values.astype(jnp.float32), np.float64)[:, 0] / np.sqrt(squares)
    scores = values @ np.asarray(kernel.astype(jnp.float32), np.float64)
    best = np.sort(scores, axis=1)[:, ::-1][:, :chosen]
    mine = np.take_along_axis(scores, experts, 1)
    if np.abs(mine - best).max() > 1e-4 or any(len(set(row)) < chosen for row in experts):
        return float("inf")
    exact = np.exp(best - best.max(1, keepdims=True))
    return float(np.abs(probabilities - exact / exact.sum(1, keepdims=True)).max())


def measure(features: int, experts: int, chosen: int, rows: int) -> dict:
    """Times and checks one shape."""
    count = min(MOST_ROUTERS, max(4, round(ROTATED_BYTES / (features * experts * 2))))
    keys = jax.random.split(jax.random.key(rows), count + 2)
    make = jax.jit(
        lambda key: (2 * features**-0.5 * jax.random.normal(key, (features, experts))).astype("bfloat16")
    )
    kernels = [make(key) for key in keys[2:]]
    values = jax.random.normal(keys[0], (rows, 1, features), jnp.bfloat16)
    x = Activations.of(values, jax.random.uniform(keys[1], (rows, 1, 8)) / 4, EPS)
    if (reason := router.supports(x, kernels[0], chosen)) is not None:
        sys.exit(f"{features}x{experts}x{chosen}, {rows} rows: the kernel {reason}")
    times = {}
    for name, function in (("kernel", of_kernel), ("xla", of_xla)):
        call = jax.jit(lambda x, kernels, f=function: [f(x, kernel, chosen) for kernel in kernels])
        durations = timing.profile(functools.partial(call, x, kernels))
        if name == "kernel":
            launches = [d for kernel, ds in durations.items() if "router_kernel" in kernel for d in ds]
            times["kernel_us"] = round(timing.Times.of(launches).median, 3)
            times["kernel_quartiles_us"] = [round(q, 3) for q in timing.Times.of(launches).quartiles]
        else:
            times["xla_us"] = round(sum(sum(ds) for ds in durations.values()) / (5 * count), 3)
    error = largest_error(x, kernels[0], chosen)
    result = {"shape": f"{features}x{experts}x{chosen}", "rows": rows, **times, "largest_error": error}
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="DxExC", help="default: published models"
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 4, 16], metavar="N", help="default: 1 4 16"
    )
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    results = [
        measure(*map(int, shape.split("x")), rows)
        for shape, rows in itertools.product(args.shapes, args.rows)
    ]
    if args.output:
        report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "router": results}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if not all(result["largest_error"] < 1e-4 for result in results):
        sys.exit("wrong results")


if __name__ == "__main__":
    main()
