"""``grinqh-jax publish``: completes the card of a checkpoint and uploads it to the hub."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools.publish import card, hub
from checkpoints_tools.publish.origin import CARD, Origin
from grinqh_jax.cli import command as cli


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    result = cli.Parser(
        prog="grinqh-jax publish",
        description="Write measured results into the model card of a checkpoint, and upload it to the hub.",
    )
    add = result.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="GRINQH checkpoint")
    add(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="output of `perplexity --json`; the name of a file is the name of its text",
    )
    add("--push-to-hub", metavar="REPO", help="upload the checkpoint to this repository, OWNER/NAME")
    return result


def publish(args: argparse.Namespace) -> int:
    """Publishes as the flags say.

    Raises:
      GrinqhError: The flags, the checkpoint or the results are unusable, or the hub refuses the upload.
    """
    card.check_checkpoint(args.model)
    results = {path.stem: card.read_results(path) for path in args.results}
    if args.push_to_hub:
        hub.check(args.push_to_hub)
    if not (args.model / CARD).exists():
        card.write_card(args.model, Origin(name=args.model.resolve().name))
    if results:
        card.write_results(args.model, results)
    print(args.model / CARD)
    if args.push_to_hub:
        print(hub.push(args.model, args.push_to_hub))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code (see ``grinqh_jax.cli.command``)."""
    return cli.run(publish, parser(), argv)
