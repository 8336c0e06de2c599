"""The verb ``benchmark``: prompt and generation speed, in rows like those of llama-bench.

``pp512`` reads a prompt of 512 tokens; ``tg128`` decodes 128 tokens one by one, in the decode chunks of the
engine. Each test runs a few times to compile and to warm up, and is then timed ``--repeats`` times. On a GPU,
each run of ``tg`` begins while the last chunk of the previous one is in progress. The model comes from a
directory, or has random weights in a published shape or in the shape of the model in a directory.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from grinqh_jax.benchmarking import measure, random_model
from grinqh_jax.benchmarking.decode_run import DecodeRun
from grinqh_jax.cli import command, flags
from grinqh_jax.cli.generation import load_generator, open_model
from grinqh_jax.cli.mesh import add_mesh, on_processes
from grinqh_jax.decoding.bits import FULL
from grinqh_jax.decoding.model_files import ModelFiles
from grinqh_jax.errors import UsageError
from grinqh_jax.json_files import json_line
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.sharding.mesh import make_mesh
from pallas_kernels import exchange
from pallas_kernels.lanes import device as lanes_device

BF16 = "bf16"
"""The item of ``--bits`` that selects an unquantized model of the same shape with random weights."""

COLUMNS = (
    ("model", 26, "<"),
    ("test", 7, "<"),
    ("bits", 6, ">"),
    ("realised", 9, ">"),
    ("tokens/s", 20, ">"),
    ("MB/token", 10, ">"),
    ("bandwidth", 9, ">"),
)
"""Title, width and alignment of each column of the table."""


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax benchmark",
        description="Measure prompt (pp) and generation (tg) speed at batch 1, in rows like those of "
        "llama-bench. The column bandwidth is the share of the device's measured read bandwidth that reading "
        "weights and cache uses.",
    )
    source = result.add_mutually_exclusive_group()
    flags.add_model(source)
    add_mesh(result)
    source.add_argument(
        "--shape",
        metavar="NAME_OR_DIR",
        help="use random weights in a published shape, or in the shape of the model in a directory; shapes: "
        f"{', '.join(random_model.shapes())}",
    )
    add = result.add_argument
    add(
        "--bits",
        type=_bits_list,
        default=["2", "3", "4", FULL, BF16],
        metavar="B,B,...",
        help="settings to measure: mean bits per weight, full (all stored bits), or bf16 (random dense "
        "weights in the same shape) (default: 2,3,4,full,bf16)",
    )
    add(
        "--prompt-tokens",
        type=flags.non_negative,
        default=512,
        metavar="N",
        help="prompt length of the test pp; 0 skips it (default: 512)",
    )
    add(
        "--generate-tokens",
        type=flags.non_negative,
        default=128,
        metavar="N",
        help="tokens decoded by the test tg, raised to whole decode chunks; 0 skips it (default: 128)",
    )
    add(
        "--context",
        type=flags.non_negative,
        default=0,
        metavar="N",
        help="tokens in the cache before the test tg (default: 0)",
    )
    add("--repeats", type=flags.positive, default=5, metavar="N", help="timed runs per test (default: 5)")
    add("--json", action="store_true", help="print one JSON object per line, not a table")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_benchmark, parser(), argv)


def _benchmark(args: argparse.Namespace) -> int:
    with on_processes(args):
        return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    source = _source(args)
    mesh = make_mesh(args.mesh, source if isinstance(source, ModelConfig) else source.config)
    bandwidth = measure.read_bandwidth() * (1 if mesh is None else mesh.size)
    device = jax.devices()[0].device_kind
    count = "" if mesh is None else f"{mesh.size} x "
    print(f"{count}{device}, jax {jax.__version__}, reads {bandwidth / 1e9:.0f} GB/s", file=sys.stderr)
    if mesh is not None:
        reason = exchange.unsupported_reason(mesh)
        by = "kernel" if reason is None else f'sum, because "kernel" {reason}'
        print(f"exchange of decode steps: {by}", file=sys.stderr)
    if not args.json:
        print(_line([title for title, _, _ in COLUMNS]), flush=True)
    measured = []
    for row in rows(args, bandwidth, source, mesh):
        print(json_line(row | {"device": device, "jax": jax.__version__}) if args.json else _table_line(row))
        sys.stdout.flush()
        measured.append(row)
    if reason := why_bf16_is_faster(measured, lanes_device.unsupported_reason()):
        print(reason, file=sys.stderr)
    return 0


def rows(
    args: argparse.Namespace,
    bandwidth: float,
    source: ModelFiles | ModelConfig,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures all tests and settings; yields one result row each, with the fields that ``_row`` documents.

    Args:
      args: parsed flags.
      bandwidth: read bandwidth of all devices together, bytes per second.
      source: Files of the model, or its configuration for random weights.
      mesh: Mesh to run the model on; None for one device.
    """
    graded_settings = [bits for bits in args.bits if bits != BF16]
    if isinstance(source, ModelConfig):
        label, model, targets = (
            random_model.label(args.shape),
            random_model.graded(source, mesh=mesh),
            random_model.TARGETS,
        )
    else:
        generator = load_generator(source, mesh)
        label, model, targets = source.directory.name, generator.model, source.targets or ()
    if not model.graded and any(bits != FULL for bits in graded_settings):
        graded_settings = [FULL]
        print(f"{label} is not quantized: only full bits are measured", file=sys.stderr)
    yield from _model_rows(label, model, targets, graded_settings, args, bandwidth)
    if BF16 in args.bits:
        config = model.config
        del model  # Not every device can hold two 8B models.
        yield from _model_rows(label, random_model.dense(config, mesh=mesh), (), [BF16], args, bandwidth)


def _source(args: argparse.Namespace) -> ModelFiles | ModelConfig:
    """Returns the files of ``--model`` or the configuration of ``--shape``.

    Raises:
      GrinqhError: there is no such model or shape.
      UsageError: a setting of ``--bits`` is out of the model's range.
    """
    source = random_model.shape(args.shape) if args.shape else open_model(args.model)
    targets = random_model.TARGETS if isinstance(source, ModelConfig) else source.targets
    if targets is not None:
        least, most = targets[0], targets[-1]
        numbers = [bits for bits in args.bits if bits not in (BF16, FULL)]
        if beyond := [bits for bits in numbers if not least <= float(bits) <= most]:
            label = random_model.label(args.shape or args.model)
            raise UsageError(
                f"--bits {', '.join(beyond)}: the dial of {label} goes from {least:g} to {most:g}"
            )
    return source


def why_bf16_is_faster(measured: Sequence[dict[str, Any]], no_kernels: str | None) -> str | None:
    """Returns one line if bf16 decodes faster than settings of the dial, else None.

    Args:
      measured: result rows.
      no_kernels: why the GPU kernels do not run; None if they do.
    """
    decoding = {row["bits"]: row for row in measured if row["test"].startswith("tg")}
    bf16 = decoding.pop(BF16, None)
    if bf16 is None:
        return None
    slower = [bits for bits, row in decoding.items() if row["tokens_per_second"] < bf16["tokens_per_second"]]
    if not slower:
        return None
    share = decoding[slower[0]]["share_of_read_bandwidth"]
    fact = f"bf16 is faster than {', '.join(slower)} bits because launches, not bytes, limit decoding here"
    if no_kernels is None:
        return f"{fact}: the model is so small that reading takes {share:.1%} of a step at {slower[0]} bits"
    return (
        f"{fact}: without the GPU kernels ({no_kernels}), a step is many small XLA loops that unpack digits, "
        f"and reading takes {share:.1%} of it at {slower[0]} bits"
    )


def _model_rows(label, model: Decoder, targets, settings, args, bandwidth) -> Iterator[dict[str, Any]]:
    if args.prompt_tokens and settings:
        prefill = measure.PrefillRun(model, args.prompt_tokens)
        timing = measure.timed(prefill.run, args.prompt_tokens, args.repeats)
        bits = settings[0] if settings[0] == BF16 else FULL
        yield _row(label, f"pp{args.prompt_tokens}", bits, timing, {}, None)
    if not args.generate_tokens or not settings:
        return
    decoding = DecodeRun(model, args.context, args.generate_tokens)
    for bits in settings:
        dial = None
        if model.graded:
            dial = decoding.settle(targets, targets[-1] if bits == FULL else float(bits))
        run_once = functools.partial(decoding.run, dial)
        timing = measure.timed_in_a_row(run_once, decoding.tokens, args.repeats)
        figures = decoding.figures(run_once())
        bytes_read = figures["bytes_per_token"] + decoding.cache_bytes()
        share = bytes_read * timing.mean / bandwidth
        yield _row(label, f"tg{decoding.tokens}", bits, timing, figures, share)


def _row(label, test, bits, timing: measure.Timing, figures, share) -> dict[str, Any]:
    """Returns a result row.

    Fields: ``tokens_per_second`` and ``deviation``, mean and standard deviation over the repeats;
    ``realised_bits`` per weight and ``bytes_per_token`` of weights, both as read in the run;
    ``share_of_read_bandwidth``, the bytes of weights and cache read per second over the device's read
    bandwidth. The last three are None for a prompt.
    """
    return {
        "model": label,
        "test": test,
        "bits": bits,
        "realised_bits": figures.get("realised_bits"),
        "tokens_per_second": round(timing.mean, 2),
        "deviation": round(timing.deviation, 2),
        "bytes_per_token": figures.get("bytes_per_token"),
        "share_of_read_bandwidth": None if share is None else round(share, 4),
    }


def _table_line(row: dict[str, Any]) -> str:
    def formatted(value, form):
        return "-" if value is None else format(value, form)

    megabytes = None if row["bytes_per_token"] is None else row["bytes_per_token"] / 1e6
    return _line(
        [
            row["model"],
            row["test"],
            row["bits"],
            formatted(row["realised_bits"], ".2f"),
            f"{row['tokens_per_second']:.2f} ± {row['deviation']:.2f}",
            formatted(megabytes, ".1f"),
            formatted(row["share_of_read_bandwidth"], ".1%"),
        ]
    )


def _line(cells: Sequence[str]) -> str:
    padded = (f"{cell:{side}{width}}" for cell, (_, width, side) in zip(cells, COLUMNS, strict=True))
    return " ".join(padded).rstrip()


def _bits_list(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    for item in items:
        if item != BF16:
            flags.bits(item)
    if not items:
        raise argparse.ArgumentTypeError("no bits given")
    return items
