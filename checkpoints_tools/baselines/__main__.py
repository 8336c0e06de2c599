"""``python -m checkpoints_tools.baselines``: quantizes a checkpoint with RTN, GPTQ or AWQ, for comparison."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools.baselines import model
from checkpoints_tools.calibration.text import CALIB_HELP, DEFAULT_TOKENS, read_calibration
from checkpoints_tools.source.open import MODEL_HELP, open_source
from grinqh_jax.cli import command as cli
from grinqh_jax.cli.progress import Progress
from grinqh_jax.errors import UsageError


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    result = cli.Parser(
        prog="python -m checkpoints_tools.baselines",
        description="Round a checkpoint to fixed precision (groups of 128, zero points) and write the "
        "dequantized weights as a Hugging Face checkpoint, which every verb reads with --bits full.",
    )
    add = result.add_argument
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add("--out", required=True, type=Path, metavar="DIR", help="directory to make")
    add("--method", required=True, choices=model.METHODS, help="quantizer")
    add("--w-bits", required=True, type=int, choices=(2, 3, 4, 8), help="bits of the integers")
    add("--calib", nargs="+", default=[], metavar="TEXT", help=CALIB_HELP)
    add(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"maximum number of calibration tokens (default {DEFAULT_TOKENS})",
    )
    add("--act-order", action="store_true", help="gptq: round the channels with the largest energy first")
    add(
        "--damping",
        type=float,
        default=0.01,
        help="gptq: share of the mean diagonal that is added to the Hessian (default 0.01)",
    )
    return result


def quantize(args: argparse.Namespace) -> int:
    """Quantizes as the flags say and prints the bits read.

    Raises:
      GrinqhError: The flags, the source or the output are unusable.
    """
    problems = []
    if args.tokens < 1:
        problems.append(f"--tokens {args.tokens}: must be positive")
    if not (args.damping > 0 and math.isfinite(args.damping)):
        problems.append(f"--damping {args.damping:g}: must be a positive number, such as 0.01")
    if problems:
        raise UsageError("; ".join(problems))
    if args.out.exists():
        raise UsageError(f"--out {args.out} exists; name a new directory")
    source = open_source(args.model)
    windows = read_calibration(source, args.calib, args.tokens).windows
    options = model.Options(
        method=args.method, bits=args.w_bits, act_order=args.act_order, damping=args.damping
    )
    title = f"{args.method} {source.directory.name}"
    try:
        with Progress(title, source.config.num_layers, "layer") as progress:
            model.quantize(source, windows, args.out, options, lambda note: progress(1, note))
    except OSError as error:  # The disk is full, or the directory is read-only.
        raise UsageError(f"{error}; fix that or name another --out directory") from None
    layers, everything = model.mean_bits_read(source, args.w_bits)
    print(
        f"{args.out}: {layers:.3f} bits read per weight of the layers, {everything:.3f} with the 16-bit head"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code (see ``grinqh_jax.cli.command``)."""
    return cli.run(quantize, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
