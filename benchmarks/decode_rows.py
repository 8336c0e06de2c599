"""Measurements of ``decode.py`` and ``two_gpus.py``: decoding of one model with its profile, and prefill."""

import itertools
import re
import time
from collections.abc import Iterator

import jax
import report as reports
import step_profile
from report import say

from grinqh_jax.benchmarking import measure, random_model
from grinqh_jax.benchmarking.decode_run import DecodeRun
from grinqh_jax.decoding import reading
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.decoder import linear_names
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
