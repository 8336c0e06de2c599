"""Prints a Markdown table of perplexity and KL divergence at several settings of the dial.

    python examples/quality_against_bits.py --data FILE.txt [--model DIR] [--reference HF_DIR] [--tokens N]

The table compares with the unquantized checkpoint ``--reference``, or with the model itself at full precision
(all stored bits). Every token is graded as in decoding.
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp

import grinqh_jax
from grinqh_jax import hf
from grinqh_jax.cli import command, flags
from grinqh_jax.evaluation.perplexity import measure, read_tokens
from grinqh_jax.evaluation.result import with_error

COLUMNS = ("--bits", "bits read", "perplexity", "of full precision", "KL divergence (nats)", "same top token")


def main() -> int:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_model(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="text that was not used in calibration")
    add("--reference", type=Path, metavar="DIR", help="unquantized Hugging Face checkpoint to compare with")
    add(
        "--tokens",
        type=flags.positive,
        default=20_000,
        metavar="N",
        help="measure the first N tokens (default: 20000)",
    )
    add(
        "--bits",
        type=flags.bits,
        nargs="+",
        default=[1.5, 2.0, 2.5, 3.0, 4.0, "full"],
        metavar="B",
        help="settings of the dial (default: 1.5 2 2.5 3 4 full)",
    )
    return command.run(print_table, parser, None)


def print_table(args: argparse.Namespace) -> int:
    generator = grinqh_jax.Generator.load(args.model)
    tokens = read_tokens(generator, args.data, args.tokens)
    reference = None
    if args.reference:
        reference = hf.load_decoder(hf.open_checkpoint(args.reference), jnp.float32)
    results = measure(
        generator.model,
        generator.targets,
        tokens,
        args.bits,
        sequence_length=min(1024, generator.model.config.max_position_embeddings),
        reference=reference,
    )
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for result in results:
        print(
            f"| {result.bits} | {result.realised_bits:.2f} "
            f"| {with_error(result.perplexity, result.stderr, '.2f')} "
            f"| {result.ratio:.3f} | {result.kl:.4f} | {result.same_top1:.1%} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
