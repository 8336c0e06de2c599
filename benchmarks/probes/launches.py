"""Launches the products of a Qwen3-8B layer once, for a profiler that reads hardware counters.

    ncu --clock-control none --set full --kernel-name regex:_kernel -o launches \\
        python benchmarks/probes/launches.py "rows 8 dense, 1 team" "level 64"

An argument is ``rows``, a number of rows and a variant of ``benchmarks/rows.py``, or ``level`` and a number
of rows of ``level_matmul`` at level 3. Those scripts use JAX's profiler, which excludes another one.
"""

import functools
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
)  # plain launches

import jax
import jax.numpy as jnp
import level_matmul as level
import matvec
import rows as of_rows
from report import compile_all

from pallas_kernels import level_matmul

SHAPES = [tuple(map(int, shape.split("x"))) for shape in matvec.LAYER]


def main() -> None:
    of_rows.COPIES = 1
    weights = {shape: matvec.random_weights(*shape, count=1) for shape in SHAPES}
    functions, arguments = {}, {}
    for product in sys.argv[1:]:
        what, number, *variant = product.split(" ", 2)
        rows = int(number)
        if what == "rows":
            xs = [of_rows.draw_x(rows, k, "random", seed=k) for k, _ in SHAPES]
            limits = [jnp.asarray(matvec.thresholds_for(x, 3)) for x in xs]
            functions[product] = of_rows.layer_function(SHAPES, weights, of_rows.VARIANTS[variant[0]], rows)
            arguments[product] = [jnp.asarray(x) for x in xs], limits, weights
        else:
            multiply = functools.partial(level_matmul, level=3, implementation="mosaic_gpu")
            functions[product] = functools.partial(level.one_after_another, multiply)
            arguments[product] = [level.draw_x(rows, k) for k, _ in SHAPES], [[weights[s][0] for s in SHAPES]]
    for product, program in compile_all(functions, arguments).items():
        jax.block_until_ready(program(*arguments[product]))
        print("launched", product, flush=True)


if __name__ == "__main__":
    main()
