"""``python -m grinqh_jax evaluate``: accuracy on word problems at each setting of the dial."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from grinqh_jax.cli import command as cli
from grinqh_jax.cli import flags
from grinqh_jax.cli.results import Result, show


def parser() -> cli.Parser:
    """The command's flags."""
    result = cli.Parser(
        prog="python -m grinqh_jax evaluate",
        description="Accuracy on word problems (GSM8K's format), answered greedily with a chain of thought.",
    )
    flags.add_model(result)
    add = result.add_argument
    add(
        "--tasks",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="a question and an answer that ends in #### N, a line",
    )
    flags.add_bits_list(result)
    add("--limit", type=flags.positive, metavar="N", help="the first N problems (default all)")
    add(
        "--max-tokens",
        type=flags.positive,
        default=256,
        metavar="N",
        help="of an answer (default 256)",
    )
    add(
        "--batch",
        type=flags.positive,
        default=64,
        metavar="N",
        help="most problems at a time (default 64)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see ``cli``)."""
    return cli.run(_evaluate, parser(), argv)


def _evaluate(args: argparse.Namespace) -> int:
    from grinqh_jax.decoding.generator import Generator
    from grinqh_jax.evaluation.tasks import read_problems

    problems = read_problems(args.tasks, args.limit)
    generator = Generator.load(args.model)
    show(_results(generator, problems, flags.dial_settings(args.bits, generator), args), args.json)
    return 0


def _results(generator, problems, bits: Sequence[float | str], args: argparse.Namespace) -> Iterator[Result]:
    from grinqh_jax.cli.progress import Progress
    from grinqh_jax.evaluation.tasks import evaluate

    with Progress("evaluate", len(bits) * len(problems), "problem") as progress:
        for setting in bits:
            yield evaluate(
                generator,
                problems,
                setting,
                max_tokens=args.max_tokens,
                batch=args.batch,
                on_progress=lambda done, setting=setting: progress(done, f"{setting} bits"),
            )


if __name__ == "__main__":
    sys.exit(main())
