"""``python -m grinqh_jax benchmark``: prompt and generation speed in rows like llama-bench's.

``pp512`` reads a prompt of 512 tokens, ``tg128`` decodes 128 tokens one by one; each is run a few times to
compile and to warm up, and then timed ``--repeats`` times. On a GPU the runs of ``tg`` are in a row, each
asked for while the one before it is under way, as the chunks of a text are. Any model directory, or random
weights of a published shape or of the shape of the model in a directory.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from grinqh_jax.benchmarking import measure, random_model
from grinqh_jax.cli import command as cli
from grinqh_jax.cli import flags
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.errors import UsageError
from grinqh_jax.model.decoder import Decoder

BF16 = "bf16"
"""In ``--bits``: an unquantized model of the same shape with random weights, for comparison."""

COLUMNS = (
    ("model", 26, "<"),
    ("test", 7, "<"),
    ("bits", 6, ">"),
    ("realised", 9, ">"),
    ("tokens/s", 20, ">"),
    ("MB/token", 10, ">"),
    ("of peak", 8, ">"),
)


def parser() -> cli.Parser:
    """The command's result."""
    result = cli.Parser(prog="grinqh-jax benchmark", description=__doc__.splitlines()[0])
    source = result.add_mutually_exclusive_group()
    flags.add_model(source)
    source.add_argument(
        "--shape",
        metavar="NAME_OR_DIR",
        help="random weights instead of a model's: of a published shape, or of the model in a directory "
        f"({', '.join(random_model.shapes())})",
    )
    result.add_argument(
        "--bits",
        type=_bits_list,
        default=["2", "3", "4", "full", BF16],
        metavar="LIST",
        help="mean bits per weight, full (all that is stored), bf16 (random dense weights of the same "
        "shape); default 2,3,4,full,bf16",
    )
    result.add_argument("--prompt-tokens", type=_tokens, default=512, metavar="N", help="of pp; 0 skips it")
    result.add_argument("--generate-tokens", type=_tokens, default=128, metavar="N", help="of tg; 0 skips it")
    result.add_argument(
        "--context", type=_tokens, default=0, metavar="N", help="tokens before tg (default 0)"
    )
    result.add_argument("--repeats", type=_positive, default=5, metavar="N", help="timed runs (default 5)")
    result.add_argument("--json", action="store_true", help="one JSON object per row on stdout")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see ``cli``)."""
    return cli.run(_run, parser(), argv)


def _run(args: argparse.Namespace) -> int:
    bandwidth = measure.read_bandwidth()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, reads {bandwidth / 1e9:.0f} GB/s", file=sys.stderr)
    if not args.json:
        print(_line([title for title, _, _ in COLUMNS]), flush=True)
    for row in rows(args, bandwidth):
        print(json.dumps(row | {"device": device, "jax": jax.__version__}) if args.json else _table_line(row))
        sys.stdout.flush()
    return 0


def rows(args: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """One dict for each line of the result; see ``_row`` for the fields."""
    label, model, targets = _load(args)
    asked = [bits for bits in args.bits if bits != BF16]
    if not model.graded and any(bits != "full" for bits in asked):
        asked = ["full"]
        print(f"{label} is not quantized: only full bits are measured", file=sys.stderr)
    if model.graded:
        low, high = targets[0], targets[-1]
        beyond = [bits for bits in asked if bits != "full" and not low <= float(bits) <= high]
        if beyond:
            raise UsageError(f"--bits {', '.join(beyond)}: {label} goes from {low:g} to {high:g}")
    yield from _rows_of(label, model, targets, asked, args, bandwidth)
    if BF16 in args.bits:
        config = model.config
        del model  # two models of 8B at once would not fit everywhere
        yield from _rows_of(label, random_model.dense(config), (), [BF16], args, bandwidth)


def _load(args: argparse.Namespace) -> tuple[str, Decoder, Sequence[float]]:
    """``(name, model, targets)``; no targets for an unquantized model."""
    if args.shape:
        model = random_model.graded(random_model.shape(args.shape))
        return random_model.label(args.shape), model, random_model.TARGETS
    generator = Generator.load(args.model)
    return generator.directory.name, generator.model, tuple(generator.targets or ())


def _rows_of(label, model: Decoder, targets, bits_list, args, bandwidth) -> Iterator[dict[str, Any]]:
    if args.prompt_tokens and bits_list:
        run = measure.PrefillRun(model, args.prompt_tokens)
        timing = measure.timed(run.run, args.prompt_tokens, args.repeats)
        bits = bits_list[0] if bits_list[0] == BF16 else "full"
        yield _row(label, f"pp{args.prompt_tokens}", bits, timing, {}, None)
    if not args.generate_tokens or not bits_list:
        return
    run = measure.DecodeRun(model, args.context, args.generate_tokens)
    for bits in bits_list:
        thresholds = None
        if model.graded:
            wanted = targets[-1] if bits == "full" else float(bits)
            thresholds = run.settled(targets, wanted)
        timing = measure.timed_in_a_row(lambda t=thresholds: run.run(t), args.generate_tokens, args.repeats)
        figures = run.figures(run.run(thresholds))
        moved = figures["bytes_per_token"] + run.cache_bytes()
        share = moved * timing.mean / bandwidth
        yield _row(label, f"tg{args.generate_tokens}", bits, timing, figures, share)


def _row(label, test, bits, timing: measure.Timing, figures, share) -> dict[str, Any]:
    """Fields: ``tokens_per_second`` mean and ``deviation`` over the repeats; ``realised_bits`` per weight
    and ``bytes_per_token`` of weights, both as really read; ``share_of_read_bandwidth``: weights and cache
    over what the device reads at most. The last three are None for a prompt."""
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
    def shown(value, text):
        return "-" if value is None else text(value)

    return _line(
        [
            row["model"],
            row["test"],
            row["bits"],
            shown(row["realised_bits"], lambda v: f"{v:.2f}"),
            f"{row['tokens_per_second']:.2f} ± {row['deviation']:.2f}",
            shown(row["bytes_per_token"], lambda v: f"{v / 1e6:.1f}"),
            shown(row["share_of_read_bandwidth"], lambda v: f"{v:.1%}"),
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


def _tokens(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
