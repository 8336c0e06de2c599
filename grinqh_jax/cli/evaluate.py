"""The verb ``evaluate``: accuracy on word problems at settings of the dial."""

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from grinqh_jax.cli import command, flags
from grinqh_jax.cli.generation import load_generator, load_speculation, open_model
from grinqh_jax.cli.mesh import add_mesh, make_mesh, on_processes
from grinqh_jax.cli.results import Result, show
from grinqh_jax.decoding.bits import Bits


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax evaluate",
        description="Measure accuracy on word problems in the format of GSM8K. The model answers each "
        "problem greedily with a chain of thought: prefill at full precision, graded decoding.",
    )
    flags.add_model(result)
    add_mesh(result)
    add = result.add_argument
    add(
        "--tasks",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="problems; each line has a question, and an answer that ends in #### N",
    )
    flags.add_bits_list(result)
    flags.add_speculate(result)
    add("--limit", type=flags.positive, metavar="N", help="use the first N problems (default: all)")
    add(
        "-n",
        "-m",
        "--max-tokens",
        type=flags.positive,
        default=256,
        metavar="N",
        help="largest number of tokens per answer (default: 256)",
    )
    add(
        "--batch",
        type=flags.positive,
        default=64,
        metavar="N",
        help="largest number of problems decoded together (default: 64)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_evaluate, parser(), argv)


def _evaluate(args: argparse.Namespace) -> int:
    with on_processes(args):
        return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    files = open_model(args.model)
    settings = flags.dial_settings(args.bits, files.targets)
    files.check(settings)
    from grinqh_jax.evaluation.tasks import read_problems

    problems = read_problems(args.tasks, args.limit)
    generator = load_generator(files, make_mesh(args, files))
    speculation = load_speculation(args.speculate, generator)
    show(_results(generator, problems, settings, args, speculation), args.json)
    return 0


def _results(
    generator, problems, settings: Sequence[Bits], args: argparse.Namespace, speculation
) -> Iterator[Result]:
    from grinqh_jax.cli.progress import Progress
    from grinqh_jax.evaluation.tasks import evaluate

    with Progress("evaluate", len(settings) * len(problems), "problem") as progress:
        for bits in settings:
            yield evaluate(
                generator,
                problems,
                bits,
                max_tokens=args.max_tokens,
                batch=args.batch,
                speculation=speculation,
                on_progress=functools.partial(progress, note=f"{bits} bits"),
            )
