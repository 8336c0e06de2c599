"""``python -m checkpoints_tools.convert``: turns a Hugging Face checkpoint into a GRINQH checkpoint."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools.calibration.text import CALIB_HELP, DEFAULT_TOKENS, SELF, read_calibration
from checkpoints_tools.convert import compilation, driver
from checkpoints_tools.convert.options import BASES, GAINS, SPLITS, Options
from checkpoints_tools.convert.plan import Plan, make_plan
from checkpoints_tools.convert.sizes import bits_per_weight_stored, directory_bytes
from checkpoints_tools.publish import hub
from checkpoints_tools.publish.card import write_card
from checkpoints_tools.publish.origin import origin_of
from checkpoints_tools.quantizers import QUANTIZERS
from checkpoints_tools.source.open import MODEL_HELP, open_source
from grinqh_jax.cli import command as cli
from grinqh_jax.cli.progress import Progress
from grinqh_jax.errors import UsageError
from grinqh_jax.memory import give_back_large_arrays, peak_host_memory


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    result = cli.Parser(
        prog="grinqh-jax convert",
        description="Quantize a checkpoint of a supported family (docs/families.md) to nested codes, one "
        "layer at a time. To resume an interrupted conversion, run the same command again.",
    )
    add = result.add_argument
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add("--out", required=True, type=Path, metavar="DIR", help="directory to make")
    add("--force", action="store_true", help="replace an existing checkpoint")
    add("--push-to-hub", metavar="REPO", help="upload the result to this repository, OWNER/NAME")
    add(
        "--calib",
        nargs="+",
        default=[],
        metavar="TEXT",
        help=CALIB_HELP,
    )
    add(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"maximum number of calibration tokens (default {DEFAULT_TOKENS})",
    )
    add_options(result)
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of ``Options`` to a parser."""
    add, default = parser.add_argument, Options()
    add(
        "--max-bits",
        type=int,
        default=default.max_bits,
        choices=(2, 4, 6, 8),
        help=f"bits stored per weight (default {default.max_bits})",
    )
    add(
        "--quantizer",
        default=default.quantizer,
        choices=tuple(QUANTIZERS),
        help=f"rounding of the weights (default {default.quantizer})",
    )
    add(
        "--basis",
        default=default.basis,
        choices=BASES,
        help="basis of the residual stream: its principal axes (default), or the original channels",
    )
    add(
        "--split",
        default=default.split,
        choices=SPLITS,
        help="split of the bits: more for layers that the predictions depend on (default), or uniform",
    )
    add(
        "--gains",
        default=default.gains,
        choices=GAINS,
        help="level gains: trained end to end (default; needs about 4000 calibration tokens), fitted by "
        "least squares where they help, or none",
    )
    add(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=default.refit,
        help="fit the weights to their graded inputs (default; needs about 6000 calibration tokens, and 1.4 "
        "for each input of a layer)",
    )


def options_of(args: argparse.Namespace) -> Options:
    """Returns the options that the flags of ``add_options`` select."""
    return Options(
        max_bits=args.max_bits,
        quantizer=args.quantizer,
        basis=args.basis,
        split=args.split,
        gains=args.gains,
        refit=args.refit,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code (see ``grinqh_jax.cli.command``)."""
    compilation.prepare()
    give_back_large_arrays()
    return cli.run(convert, parser(), argv)


def convert(args: argparse.Namespace) -> int:
    """Converts as the flags say and prints the size of the checkpoint.

    Raises:
      GrinqhError: The flags, the source or the output are unusable.
    """
    started = time.monotonic()
    if args.tokens < 1:
        raise UsageError(f"--tokens {args.tokens}: must be positive")
    if args.push_to_hub:
        hub.check(args.push_to_hub)
    source = open_source(args.model)
    with cli.status("sampling calibration text" if SELF in args.calib else "reading calibration text"):
        calibration = read_calibration(source, args.calib, args.tokens)
    plan = make_plan(source, calibration, options_of(args))
    out = convert_with_progress(plan, args.out, overwrite=args.force)
    write_card(out, origin_of(source, args.model))
    print(
        f"{out}: {bits_per_weight_stored(source.config, args.max_bits):.3f} bits per weight stored, "
        f"{directory_bytes(out) / 1e6:,.1f} MB on disk, peak memory {peak_host_memory() / 2**20:,.0f} MiB, "
        f"{time.monotonic() - started:.0f} s"
    )
    for line in plan.not_done:
        print(line)
    if args.push_to_hub:
        print(hub.push(out, args.push_to_hub))
    return 0


def convert_with_progress(plan: Plan, out: Path, *, overwrite: bool = False) -> Path:
    """Converts with a progress bar (see ``driver.convert``).

    Raises:
      CheckpointError: See ``driver.convert``.
      UsageError: The checkpoint cannot be written: the disk is full, the directory read-only.
    """
    try:
        with Progress(f"convert {plan.source.directory.name}", plan.work) as progress:
            return driver.convert(
                plan,
                out,
                overwrite=overwrite,
                on_progress=lambda note: progress(plan.work_of(note), note),
            )
    except OSError as error:
        raise UsageError(f"{error}; fix that and run the same command again to resume") from None


if __name__ == "__main__":
    sys.exit(main())
