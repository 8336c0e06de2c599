"""The verb ``perplexity``: perplexity and KL divergence of a text at settings of the dial."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from grinqh_jax.cli import command, flags
from grinqh_jax.cli.results import show


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax perplexity",
        description="Measure the perplexity of a text, and its KL divergence and same-top-token share "
        "against full precision, with every token graded. Standard errors treat windows, not tokens, as "
        "independent. The standard error of the ratio to the reference is paired.",
    )
    flags.add_model(result)
    add = result.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="text file, or a .jsonl file with text, or with question and answer, on each line",
    )
    flags.add_bits_list(result)
    add("--tokens", type=flags.positive, metavar="N", help="measure the first N tokens (default: all)")
    add(
        "--sequence-length",
        type=flags.positive,
        default=1024,
        metavar="L",
        help="tokens per window; windows do not overlap (default: 1024)",
    )
    add(
        "--reference",
        metavar="DIR_OR_HUB_ID",
        help="model to compare with (default: the same model at full precision)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_perplexity, parser(), argv)


def _perplexity(args: argparse.Namespace) -> int:
    from grinqh_jax.cli.progress import Progress
    from grinqh_jax.decoding.generator import Generator
    from grinqh_jax.evaluation.perplexity import measure, read_tokens

    generator = Generator.load(args.model)
    settings = flags.dial_settings(args.bits, generator)
    tokens = read_tokens(generator, args.data, args.tokens)
    reference = Generator.load(args.reference).model if args.reference else None
    with Progress("perplexity", len(tokens), "token") as progress:
        results = measure(
            generator.model,
            generator.targets,
            tokens,
            settings,
            sequence_length=args.sequence_length,
            reference=reference,
            on_progress=progress,
        )
    show(results, args.json)
    for result in results:
        if result.token_bits and not args.json:
            print(f"--bits {result.bits:g}: {result.token_bits.line()}")
    return 0
