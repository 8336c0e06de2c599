"""Kernels of a prefill, by device time, in bf16 and graded.

    python benchmarks/prefill_kernels.py --shapes Qwen3-8B Qwen3-30B-A3B --tokens 2048 --layers 4

All layers of these shapes have the same kernels, so a few of them show where the time goes.
"""

import argparse
import dataclasses
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import report as reports
import timing
from report import say

from grinqh_jax.benchmarking import random_model
from grinqh_jax.benchmarking.measure import PrefillRun

REPEATS = 5
"""Number of profiled calls."""

LARGEST = 25
"""Number of kernels that are reported."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["Qwen3-8B"], metavar="NAME_OR_DIR", help="default: Qwen3-8B")
    add("--tokens", type=int, default=2048, metavar="N", help="length of the prompt (default: 2048)")
    add("--layers", type=int, default=4, metavar="N", help="layers of the model (default: 4)")
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args, prefills=[])
    for shape in args.shapes:
        whole = random_model.shape(shape)
        config = dataclasses.replace(whole, layers=whole.layers[: args.layers])
        for name, make in (("bf16", random_model.dense), ("graded", random_model.graded)):
            if report.out_of_time(f"{shape}, {name}"):
                continue
            run = PrefillRun(make(config), args.tokens)
            durations = timing.profile(run.run, REPEATS)
            total = sum(map(sum, durations.values())) / REPEATS
            say(f"{shape} {name}: {total:.0f} us for {len(config.layers)} layers and the head")
            ranked = sorted(durations.items(), key=lambda item: -sum(item[1]))[:LARGEST]
            kernels = [
                {
                    "kernel": kernel,
                    "us": round(sum(times) / REPEATS, 1),
                    "launches": len(times) / REPEATS,
                }
                for kernel, times in ranked
            ]
            for kernel in kernels:
                say(f"  {kernel['us']:8.1f} us {kernel['launches']:5.1f} launches  {kernel['kernel'][:60]}")
            report.fields["prefills"].append(
                {"shape": shape, "weights": name, "us": round(total, 1), "kernels": kernels}
            )
            report.save()
    report.finish()


if __name__ == "__main__":
    main()
