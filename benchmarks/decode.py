"""Times decoding and prefill of whole models with random weights.

    python benchmarks/decode.py --shapes Qwen3-8B Llama-3.1-8B --output benchmarks/results/decode.json
    python benchmarks/decode.py --shapes Qwen3-0.6B --contexts 128 --layers 2 --tokens 4     a quick check
    python benchmarks/decode.py --shapes path/to/model     the shape of the model in a directory
    python benchmarks/decode.py --batch 1 2 4 8 16 32 64 --contexts 1024 --prefill     several rows
    python benchmarks/decode.py --contexts --prefill 512 2048     prefill alone
    python benchmarks/decode.py --mesh none tp=2 --batch 1 8 --bits 3 4     one GPU, and two
    python benchmarks/decode.py --profile-contexts 1024     also a table of one step

For each shape, the script times decoding at several batch sizes, mean bits and contexts, this library's own
bf16 decoding in the same run, and prefill against bf16 prefill. More than 16 rows read all channels at one
level, as an engine with so many slots does. The programs of all batch sizes compile in parallel, so their
caches are in memory together. The JSON file is written after each row. With ``--profile-contexts`` the script
prints a table of one step's device time by category (``step_profile``) at 3 bits and in bf16.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import platform

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import report as reports
from decode_rows import (
    WARM_UP_SECONDS,
    WARM_UP_SECONDS_OF_A_BATCH,
    compiled_runs,
    decode_rows,
    prefill_row,
)
from report import say

from grinqh_jax.benchmarking import measure, random_model
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.sharding.mesh import make_mesh


def bench_shape(config: ModelConfig, name: str, args, bandwidth: float, report: reports.Report) -> None:
    """Measures one shape on each mesh: the graded model, then the dense one, so only one is in memory."""
    if args.layers:
        config = dataclasses.replace(config, layers=config.layers[: args.layers])
    results = report.fields["shapes"][name] = {"decode": [], "prefill": []}
    kinds = ("graded", random_model.graded, args.bits), ("bf16", random_model.dense, [None])
    for mesh, (kind, make, bits) in itertools.product(args.mesh, kinds):
        if kind not in args.weights or report.out_of_time(f"{name}, {kind}, mesh {mesh}"):
            continue
        devices = make_mesh(None if mesh == "none" else mesh, config)
        model = jax.block_until_ready(make(config, mesh=devices, exchange=args.exchange))
        say(f"{name}: made {kind} weights, mesh {mesh}")
        runs, warm_up = compiled_runs(model, bits, args), WARM_UP_SECONDS
        for batch in args.batch:
            case = f"{name}, {kind}, mesh {mesh}, batch {batch}"
            if report.out_of_time(case):
                continue
            run = runs.pop(batch)
            rows = decode_rows(model, name, batch, bits, args, bandwidth, run, warm_up)
            for count, row in enumerate(rows, 1):
                results["decode"].append(row)
                add_ratios(results)
                report.save()
                if count < len(bits) * len(args.contexts) and report.out_of_time(f"the rest of {case}"):
                    break
            warm_up = WARM_UP_SECONDS_OF_A_BATCH
        del runs
        for tokens, chunk in itertools.product(args.prefill, [None, args.chunk] if args.chunk else [None]):
            if not report.out_of_time(f"{name}, {kind}, mesh {mesh}, prefill of {tokens}"):
                results["prefill"].append(prefill_row(model, name, kind, tokens, chunk, args.repeats))
                add_ratios(results)
                report.save()
        del model


def add_ratios(results: dict) -> None:
    """Adds to each row its speed relative to bf16 and to one device, where those rows exist."""

    def case(row):
        return row["devices"], row["batch"], row["context"]

    dense = {case(row): row["tokens_per_second"] for row in results["decode"] if row["bits"] == "bf16"}
    one = {
        (row["bits"], *case(row)[1:]): row["tokens_per_second"]
        for row in results["decode"]
        if row["devices"] == 1
    }
    for row in results["decode"]:
        if case(row) in dense:
            row["times_bf16"] = round(row["tokens_per_second"] / dense[case(row)], 3)
        if row["devices"] > 1 and (same := one.get((row["bits"], *case(row)[1:]))):
            row["times_one_device"] = round(row["tokens_per_second"] / same, 3)
    for row in results["prefill"]:
        dense = [r for r in results["prefill"] if r["weights"] == "bf16"]
        keys = "prompt", "chunk", "devices"
        same = [r for r in dense if all(r[key] == row[key] for key in keys)]
        if same:
            row["time_over_bf16"] = round(same[0]["tokens_per_second"] / row["tokens_per_second"], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        default=["Qwen3-8B"],
        metavar="NAME_OR_DIR",
        help="published shapes, or directories of models (default: Qwen3-8B)",
    )
    add("--layers", type=int, metavar="N", help="keep the first N layers (default: all)")
    add(
        "--bits",
        nargs="+",
        type=float,
        default=[2, 3, 4, 8],
        metavar="B",
        help="settings of the dial (default: 2 3 4 8)",
    )
    add(
        "--contexts",
        nargs="*",
        type=int,
        default=[128, 1024, 4096],
        metavar="N",
        help="tokens in the cache before decoding (default: 128 1024 4096; no value skips decoding)",
    )
    add(
        "--batch",
        nargs="+",
        type=int,
        default=[1],
        metavar="N",
        help="rows that decode together (default: 1)",
    )
    add(
        "--mesh",
        nargs="+",
        default=["none"],
        metavar="tp=N",
        help="meshes to measure: tp=N, auto, or none for one device (default: none)",
    )
    add(
        "--exchange",
        choices=("auto", "kernel", "sum"),
        default="auto",
        help="how devices add up results: with a kernel that writes to the memory of all devices, or with an "
        "all-reduce; auto takes the kernel where it can run (default: auto)",
    )
    add(
        "--weights",
        nargs="+",
        default=["graded", "bf16"],
        choices=("graded", "bf16"),
        help="models to time (default: graded bf16)",
    )
    add(
        "--fixed-thresholds",
        action="store_true",
        help="also time decoding at fixed thresholds; the difference is the cost of the dial",
    )
    add("--tokens", type=int, default=64, metavar="N", help="tokens decoded per dispatch (default: 64)")
    add(
        "--prefill",
        nargs="*",
        type=int,
        default=[2048],
        metavar="N",
        help="prompt lengths (default: 2048; no value skips prefill)",
    )
    add("--chunk", type=int, metavar="N", help="also time prefill in buckets of N tokens")
    add("--repeats", type=int, default=5, metavar="N", help="timed runs (default: 5)")
    add(
        "--profile-contexts",
        nargs="*",
        type=int,
        default=[],
        metavar="N",
        help="contexts whose step is profiled (default: none)",
    )
    add("--profile-bits", nargs="*", type=float, default=[3, None], help=argparse.SUPPRESS)
    add("--hlo", type=pathlib.Path, metavar="DIR", help="write the optimized HLO into this directory")
    add("--platform", choices=("cpu", "cuda"), help="platform, as in JAX_PLATFORMS (default: JAX's choice)")
    reports.add_arguments(parser)
    args = parser.parse_args()
    args.batch = args.batch if args.contexts else []
    if args.platform:
        jax.config.update("jax_platforms", args.platform)
    configs = {random_model.label(shape): random_model.shape(shape) for shape in args.shapes}
    if len(configs) < len(args.shapes):
        parser.error(
            f"--shapes {' '.join(args.shapes)}: two shapes have the same name; run the script once for each"
        )

    bandwidth = measure.read_bandwidth()
    report = reports.Report(
        args,
        jax=jax.__version__,
        python=platform.python_version(),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        read_bandwidth_bytes_per_second=round(bandwidth),
        shapes={},
    )
    say(f"{report.fields['device']}, jax {jax.__version__}, reads {bandwidth / 1e12:.2f} TB/s")
    for name, config in configs.items():
        bench_shape(config, name, args, bandwidth, report)
    report.finish()


if __name__ == "__main__":
    main()
