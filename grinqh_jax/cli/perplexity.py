"""The verb ``perplexity``: perplexity and KL divergence of a text at settings of the dial."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from grinqh_jax.cli import command, flags
from grinqh_jax.cli.generation import load_generator, open_model
from grinqh_jax.cli.mesh import add_mesh, make_mesh, on_processes
from grinqh_jax.cli.reference import find_reference
from grinqh_jax.cli.results import show


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax perplexity",
        description="Measure the perplexity of a text, and its KL divergence and same-top-token share "
        "against a reference, with every token graded. Standard errors treat windows, not tokens, as "
        "independent. The standard error of the ratio to the reference is paired.",
    )
    flags.add_model(result)
    add_mesh(result)
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
        help="model to compare with, or self for the model's own full precision (default: the original, if "
        "it is where config.json says, else self)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_perplexity, parser(), argv)


def _perplexity(args: argparse.Namespace) -> int:
    with on_processes(args):
        return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    files = open_model(args.model)
    settings = flags.dial_settings(args.bits, files.targets)
    files.check(settings)
    from grinqh_jax.cli.progress import Progress
    from grinqh_jax.evaluation.perplexity import check, measure, read_tokens

    tokens = read_tokens(files, args.data, args.tokens)
    reference = find_reference(files, args.reference)
    reference_config = None if reference.files is None else reference.files.config
    check(files.config, tokens, args.sequence_length, reference_config)
    if not args.json:
        print(f"compared with {reference.description}", flush=True)
    mesh = make_mesh(args, files)
    generator = load_generator(files, mesh)
    with Progress("perplexity", len(tokens), "token") as progress:
        results = measure(
            generator.model,
            generator.targets,
            tokens,
            settings,
            sequence_length=args.sequence_length,
            reference=None if reference.files is None else load_generator(reference.files, mesh).model,
            on_progress=progress,
        )
    show(results, args.json, {"reference": reference.name})
    for result in results:
        if result.token_bits and not args.json:
            print(f"--bits {result.bits:g}: {result.token_bits.line()}")
    return 0
