"""``python -m checkpoints_tools.convert``: from a Hugging Face checkpoint to a GRINQH checkpoint."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools.calibration import text
from checkpoints_tools.conversion import Calibration, Conversion, bits_per_weight_stored, directory_bytes
from checkpoints_tools.progress import Progress, peak_memory
from checkpoints_tools.quantizers import QUANTIZERS
from grinqh_jax.errors import CheckpointError, GrinqhError, UsageError
from grinqh_jax.hf import HFCheckpoint, open_checkpoint

TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json"}
"""Without one of these files transformers makes up an empty tokenizer."""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    result = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.convert",
        description="Quantize a Llama 3 or Qwen3 checkpoint to nested codes, one layer at a time. "
        "An interrupted conversion goes on when the same command is run again.",
    )
    add = result.add_argument
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="Hugging Face checkpoint (safetensors)")
    add("--out", required=True, type=Path, metavar="DIR", help="directory to make")
    add("--calib", type=Path, metavar="FILE", help=".txt, or .jsonl with text or question and answer")
    add("--max-bits", type=int, default=8, choices=(2, 4, 6, 8), help="bits stored per weight (default 8)")
    add("--tokens", type=int, default=16384, metavar="N", help="calibration tokens (default 16384)")
    add("--quantizer", default="rtn", choices=tuple(QUANTIZERS), help="how weights are rounded (default rtn)")
    add("--force", action="store_true", help="replace an existing checkpoint")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 2 usage or bad input, 1 anything else."""
    args = parser().parse_args(argv)
    try:
        _convert(args)
    except GrinqhError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; mend that and run the same command again to go on", file=sys.stderr)
        return 1
    return 0


def _convert(args: argparse.Namespace) -> None:
    started = time.monotonic()
    if args.tokens < 1:
        raise UsageError(f"--tokens {args.tokens}: must be positive")
    source = open_checkpoint(args.model)
    conversion = Conversion(
        source,
        _calibration(source, args.calib, args.tokens),
        max_bits=args.max_bits,
        quantizer=args.quantizer,
    )
    with Progress(f"convert {source.directory.name}", conversion.steps) as progress:
        out = conversion.write(args.out, overwrite=args.force, progress=progress)
    print(
        f"{out}: {bits_per_weight_stored(source, args.max_bits):.3f} bits per weight stored, "
        f"{directory_bytes(out) / 1e6:,.1f} MB on disk, peak memory {peak_memory() / 2**20:,.0f} MiB, "
        f"{time.monotonic() - started:.0f} s"
    )


def _calibration(source: HFCheckpoint, path: Path | None, tokens: int) -> Calibration:
    if not TOKENIZERS & {path.name for path in source.companions}:
        raise CheckpointError(f"{source.directory}: there is no tokenizer ({', '.join(sorted(TOKENIZERS))})")
    from transformers import AutoTokenizer  # takes seconds: not before the flags are known to be right

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.directory, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source.directory}: cannot load the tokenizer: {reason:.300}") from None
    separator = tokenizer.eos_token or "\n\n"
    documents = text.read_documents(path or text.DEFAULT_TEXT)
    length = min(text.MAX_WINDOW, source.config.max_position_embeddings)

    def encode(piece: str) -> list[int]:
        return tokenizer(piece, verbose=False)["input_ids"]

    windows = text.windows(separator.join(documents), encode, tokens, length)
    if windows.max() >= source.config.vocab_size:
        raise CheckpointError(
            f"{source.directory}: the tokenizer gives token {windows.max()}, the model has a vocabulary of"
            f" {source.config.vocab_size}"
        )
    return Calibration(windows=windows, name=path.name if path else "bundled")


if __name__ == "__main__":
    sys.exit(main())
