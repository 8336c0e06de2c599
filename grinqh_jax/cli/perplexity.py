"""``python -m grinqh_jax perplexity``: how well a text is predicted at each setting of the dial."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grinqh_jax.cli import command as cli
from grinqh_jax.cli import flags
from grinqh_jax.cli.results import show


def parser() -> cli.Parser:
    """The command's flags."""
    result = cli.Parser(
        prog="python -m grinqh_jax perplexity",
        description="Perplexity of a text, and KL divergence from full precision, with every token graded. "
        "Standard errors take windows as the independent draws; those of the ratio to the reference are "
        "paired.",
    )
    flags.add_model(result)
    add = result.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="text, or .jsonl with text or questions")
    flags.add_bits_list(result)
    add(
        "--tokens",
        type=flags.positive,
        metavar="N",
        help="the first N tokens of the data (default all)",
    )
    add(
        "--sequence-length",
        type=flags.positive,
        default=1024,
        metavar="L",
        help="tokens of a window; windows do not overlap (default 1024)",
    )
    add("--reference", metavar="DIR_OR_HUB_ID", help="compare with this model, not with full precision")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see ``cli``)."""
    return cli.run(_perplexity, parser(), argv)


def _perplexity(args: argparse.Namespace) -> int:
    from grinqh_jax.cli.progress import Progress
    from grinqh_jax.decoding.generator import Generator
    from grinqh_jax.evaluation.perplexity import measure, read_tokens

    generator = Generator.load(args.model)
    bits = flags.dial_settings(args.bits, generator)
    tokens = read_tokens(generator, args.data, args.tokens)
    reference = Generator.load(args.reference).model if args.reference else None
    with Progress("perplexity", len(tokens), "token") as progress:
        results = measure(
            generator.model,
            generator.targets,
            tokens,
            bits,
            sequence_length=args.sequence_length,
            reference=reference,
            on_progress=progress,
        )
    show(results, args.json)
    for result in results:
        if result.token_bits and not args.json:
            print(f"--bits {result.bits:g}: {result.token_bits.line()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
