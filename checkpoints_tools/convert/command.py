"""``python -m checkpoints_tools.convert``: from a Hugging Face checkpoint to a GRINQH checkpoint."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools.calibration import text
from checkpoints_tools.convert.conversion import (
    BASES,
    GAINS,
    PRINCIPAL,
    SENSITIVITY,
    SPLITS,
    TRAINED,
    Calibration,
    Conversion,
)
from checkpoints_tools.convert.sizes import bits_per_weight_stored, directory_bytes
from checkpoints_tools.quantizers import QUANTIZERS
from grinqh_jax.cli import command as cli
from grinqh_jax.cli.progress import Progress
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.hf import HFCheckpoint, open_checkpoint
from grinqh_jax.memory import peak_host_memory
from grinqh_jax.text.documents import read_documents
from grinqh_jax.text.tokenizer import Tokenizer


def parser() -> cli.Parser:
    """The command's flags."""
    result = cli.Parser(
        prog="python -m checkpoints_tools.convert",
        description="Quantize a Llama 3 or Qwen3 checkpoint to nested codes, one layer at a time. "
        "An interrupted conversion goes on when the same command is run again.",
    )
    add = result.add_argument
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="Hugging Face checkpoint (safetensors)")
    add("--out", required=True, type=Path, metavar="DIR", help="directory to make")
    add(
        "--calib",
        type=Path,
        metavar="FILE",
        help="calibration text: .txt, or .jsonl with text or question and answer (default: a bundled text)",
    )
    add("--max-bits", type=int, default=8, choices=(2, 4, 6, 8), help="bits stored per weight (default 8)")
    add("--tokens", type=int, default=32768, metavar="N", help="calibration tokens, at most (default 32768)")
    add("--quantizer", default="rtn", choices=tuple(QUANTIZERS), help="how weights are rounded (default rtn)")
    add(
        "--basis",
        default=PRINCIPAL,
        choices=BASES,
        help="principal: turn the residual stream onto its principal axes (default); original: as it is",
    )
    add(
        "--split",
        default=SENSITIVITY,
        choices=SPLITS,
        help="sensitivity: more bits for layers that the predictions depend on (default); uniform: all alike",
    )
    add(
        "--gains",
        default=TRAINED,
        choices=GAINS,
        help="trained: a gain for every level, trained end to end (default, if the calibration text has some "
        "4000 tokens); fitted: least-squares gains where they help; none: levels as they are",
    )
    add(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fit weights to what graded reading makes of their inputs (default, where the calibration text "
        "has some 6000 tokens, and 1.4 for each input), or round them as they are",
    )
    add("--force", action="store_true", help="replace an existing checkpoint")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see ``grinqh_jax.cli.command``)."""
    return cli.run(convert, parser(), argv)


def convert(args: argparse.Namespace) -> int:
    """Converts as the flags say.

    Raises:
      GrinqhError: what is wrong with the flags, the source or the output.
    """
    started = time.monotonic()
    if args.tokens < 1:
        raise UsageError(f"--tokens {args.tokens}: must be positive")
    source = open_checkpoint(args.model)
    calibration = read_calibration(source, args.calib, args.tokens)
    conversion = Conversion(
        source,
        calibration,
        max_bits=args.max_bits,
        quantizer=args.quantizer,
        basis=args.basis,
        split=args.split,
        gains=args.gains,
        refit=args.refit,
    )
    try:
        with Progress(f"convert {source.directory.name}", conversion.steps, "part") as progress:
            out = conversion.write(args.out, overwrite=args.force, done=lambda part: progress(1, part))
    except OSError as error:  # a full disk, a read-only directory
        raise UsageError(f"{error}; mend that and run the same command again to go on") from None
    print(
        f"{out}: {bits_per_weight_stored(source, args.max_bits):.3f} bits per weight stored, "
        f"{directory_bytes(out) / 1e6:,.1f} MB on disk, peak memory {peak_host_memory() / 2**20:,.0f} MiB, "
        f"{time.monotonic() - started:.0f} s"
    )
    for line in conversion.not_done:
        print(line)
    return 0


def read_calibration(source: HFCheckpoint, path: Path | None, tokens: int) -> Calibration:
    """The calibration windows of a text file, or of the bundled text.

    Raises:
      GrinqhError: there is no usable tokenizer, or the text cannot be used.
    """
    tokenizer = Tokenizer.load(source.directory)
    documents = read_documents(path or text.DEFAULT_TEXT)
    length = min(text.MAX_WINDOW, source.config.max_position_embeddings)
    windows = text.windows("\n\n".join(documents), tokenizer.encode, tokens, length)
    if windows.max() >= source.config.vocab_size:
        raise CheckpointError(
            f"{source.directory}: the tokenizer gives token {windows.max()}, the model has a vocabulary of"
            f" {source.config.vocab_size}"
        )
    return Calibration(windows=windows, name=path.name if path else "bundled")


if __name__ == "__main__":
    sys.exit(main())
