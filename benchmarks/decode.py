"""Times decoding and prefill of whole models with random weights.

    python benchmarks/decode.py --shapes Qwen3-8B Llama-3.1-8B --output benchmarks/results/decode.json
    python benchmarks/decode.py --shapes Qwen3-0.6B --contexts 128 --layers 2 --tokens 4     a quick check
    python benchmarks/decode.py --shapes path/to/model     the shape of the model in a directory
    python benchmarks/decode.py --batch 1 2 4 8 16 32 64 --contexts 1024 --prefill     several rows
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
import re
import time
from collections.abc import Iterator

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import report as reports
import step_profile
from report import say

from grinqh_jax.benchmarking import measure, random_model
from grinqh_jax.benchmarking.decode_run import DecodeRun
from grinqh_jax.decoding import reading
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.sharding.mesh import make_mesh
from pallas_kernels.layout import DIGIT_BITS

WARM_UP_SECONDS = 2.0
"""Duration of decoding before the first measurement: it is slower right after the weights are made."""

WARM_UP_SECONDS_OF_A_BATCH = 0.5
"""Duration of decoding before the first measurement of each other batch size."""


def set_level(run: DecodeRun, bits: float | None) -> None:
    """Sets the level at which an engine with so many slots reads, if it grades no rows."""
    if bits is not None:
        run.level = reading.batch_level(run.batch, [bits], run.model.full_bits // DIGIT_BITS)


def compiled_runs(model, bits_list, args) -> dict[int, DecodeRun]:
    """Returns runs by batch size whose programs for all settings of the dial are compiled."""
    start, runs, lowered = reports.elapsed(), {}, []
    for batch in args.batch:
        run = runs[batch] = DecodeRun(model, max(args.contexts), args.tokens, batch)
        levels = set()
        for bits in bits_list:
            set_level(run, bits)
            if run.level in levels:
                continue
            levels.add(run.level)
            dial = None if bits is None else Dial.create(model, random_model.TARGETS, [bits] * batch)
            lowered.append(run.lower(dial))
            if args.fixed_thresholds and dial is not None:
                lowered.append(run.lower(dial.thresholds))
    lowering = reports.elapsed() - start
    # The products of a dense model are autotuned on the GPU, one program after the other.
    reports.compile_lowered(lowered, 1 if bits_list[0] is None else reports.COMPILING_THREADS)
    say(f"{len(lowered)} programs: lowered {lowering:.0f} s, compiled in {reports.elapsed() - start:.0f} s")
    return runs


def decode_rows(
    model,
    label: str,
    batch: int,
    bits_list,
    args,
    bandwidth: float,
    run: DecodeRun,
    warm_up: float = WARM_UP_SECONDS,
) -> Iterator[dict]:
    """Times decoding at each context and setting of the dial, and profiles those that ``args`` select.

    One program, with a cache for the longest context, serves all of them.

    Args:
      model: Model to time.
      label: Name of the model in the rows.
      batch: Number of rows that decode together.
      bits_list: Settings of the dial; ``[None]`` for a dense model.
      args: Parsed flags.
      bandwidth: Read bandwidth of the device, bytes per second.
      run: The run.
      warm_up: Duration of decoding before the first measurement, seconds.

    Yields:
      A row after each measurement.
    """
    devices = 1 if model.partition is None else model.partition.devices
    set_level(run, bits_list[0])
    dial = None if bits_list[0] is None else run.settle(random_model.TARGETS, bits_list[0])
    warm, is_first = time.monotonic() + warm_up, True
    while time.monotonic() < warm:
        jax.block_until_ready(run.run(dial))
    for context, bits in itertools.product(args.contexts, bits_list):
        run.context = context
        set_level(run, bits)
        dial = None if bits is None else run.settle(random_model.TARGETS, bits)
        if args.fixed_thresholds and dial is not None:
            fixed = dial.thresholds
            fixed_timing = measure.timed_in_a_row(lambda t=fixed: run.run(t), run.tokens, args.repeats)
        timing = measure.timed_in_a_row(lambda d=dial: run.run(d), run.tokens, args.repeats)
        chunk = run.run(dial)
        figures = run.figures(chunk)
        moved = figures["bytes_per_token"] + run.cache_bytes()
        row = {
            "shape": label,
            "bits": bits or "bf16",
            "batch": batch,
            "level": run.level,
            "devices": devices,
            "context": context,
            "tokens_per_second": round(timing.mean, 2),
            "tokens_per_second_of_all_rows": round(batch * timing.mean, 2),
            "deviation": round(timing.deviation, 2),
            "us_per_token": round(1e6 / timing.mean, 1),
            **figures,
            "cache_bytes_per_token": run.cache_bytes(),
        }
        if batch == 1:  # Rows share the weights that they read, and nothing counts those.
            row["share_of_read_bandwidth"] = round(moved * timing.mean / (bandwidth * devices), 4)
        if args.fixed_thresholds and dial is not None:
            row["us_per_token_fixed_thresholds"] = round(1e6 / fixed_timing.mean, 1)
        realised = "" if bits is None else f" (realised {figures['realised_bits']:.2f})"
        say(
            f"{label} on {devices} device{'s' * (devices > 1)}, batch {batch}, context {context}, "
            f"{row['bits']} bits{realised}: "
            f"{batch * timing.mean:.1f} tokens/s, {timing.mean:.1f} +- {timing.deviation:.1f} of a row, "
            f"{row['us_per_token']} us a step, {moved / 1e9:.2f} GB/token"
        )
        if context in args.profile_contexts and bits in args.profile_bits:
            row["profile"] = profile(run, dial, args, row)
        if is_first:
            hlo, is_first = run.compiled.as_text(), False
            row["copies_in_hlo"] = copies(hlo)
            if args.hlo:
                kind = "dense" if bits is None else "graded"
                (args.hlo / f"decode-{label}-{kind}.hlo").write_text(hlo)
        yield row


def copies(hlo: str) -> list[str]:
    """Returns copies above 64 KiB in an optimized HLO as ``type[shape]``. They copy weights or caches."""
    sizes = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "pred": 1}
    large = []
    for dtype, shape in re.findall(r"= (\w+)\[([\d,]*)\]\S* copy(?:-start)?\(", hlo):
        size = sizes.get(dtype, 8)
        for n in shape.split(",") if shape else []:
            size *= int(n)
        if size > 1 << 16:
            large.append(f"{dtype}[{shape}]")
    return large


def profile(run: DecodeRun, dial, args, row: dict) -> dict | None:
    """Returns the table of one step, or None on a CPU, for which the profiler lists no kernels."""
    kernels = step_profile.trace(lambda: run.run(dial))
    if not kernels:
        return None
    layers = [name for name in linear_names(run.model.config) if not in_head(name)]
    linears = [*layers, *run.model.lm_head.names]  # a dense model has one
    hlo = run.compiled.as_text()
    table = step_profile.tabulate(kernels, run.tokens, hlo, linears, row["us_per_token"])
    say(f"one step of {row['shape']}, {row['bits']} bits, context {row['context']}:")
    print("\n".join(table.lines()), flush=True)
    return table.to_json()


def prefill_row(model, label: str, kind: str, tokens: int, chunk: int | None, repeats: int) -> dict:
    """Times prefill. ``temp_bytes`` is the memory that XLA allocates beside arguments and results."""
    run = measure.PrefillRun(model, tokens, chunk)
    timing = measure.timed(run.run, tokens, repeats)
    memory = run.compiled.memory_analysis()
    say(
        f"{label} {kind} prefill of {tokens} (buckets of {run.bucket}): {timing.mean:.0f} +- "
        f"{timing.deviation:.0f} tokens/s, {1e3 * tokens / timing.mean:.2f} ms, "
        f"temporary memory {memory.temp_size_in_bytes / 1e6:.0f} MB"
    )
    return {
        "shape": label,
        "weights": kind,
        "devices": 1 if model.partition is None else model.partition.devices,
        "prompt": tokens,
        "chunk": run.bucket,
        "tokens_per_second": round(timing.mean, 1),
        "deviation": round(timing.deviation, 1),
        "temp_bytes": memory.temp_size_in_bytes,
    }


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
        nargs="+",
        type=int,
        default=[128, 1024, 4096],
        metavar="N",
        help="tokens in the cache before decoding (default: 128 1024 4096)",
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
