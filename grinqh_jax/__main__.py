"""``grinqh-jax VERB``, also ``python -m grinqh_jax VERB``."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from grinqh_jax import __version__
from grinqh_jax.cli import command

VERBS = {
    "generate": ("grinqh_jax.cli.generate", "generate text from a prompt"),
    "chat": ("grinqh_jax.cli.chat", "chat with a model in the terminal"),
    "perplexity": (
        "grinqh_jax.cli.perplexity",
        "measure perplexity and KL divergence at settings of the dial",
    ),
    "evaluate": ("grinqh_jax.cli.evaluate", "measure accuracy on word problems at settings of the dial"),
    "lm-eval": ("grinqh_jax.cli.lm_eval", "run tasks of lm-evaluation-harness (needs the extra eval)"),
    "benchmark": ("grinqh_jax.cli.benchmark", "measure prompt and generation speed"),
    "serve": (
        "grinqh_jax.cli.serve",
        "serve a model over HTTP with OpenAI's protocol (needs the extra serve)",
    ),
    "bench-serve": ("grinqh_jax.cli.bench_serve", "measure a running server under load"),
    "inspect": ("grinqh_jax.cli.inspect", "say what a checkpoint is and whether it is supported"),
    "plan": ("grinqh_jax.cli.plan", "say on how many devices a model fits"),
    "convert": (
        "checkpoints_tools.convert.command",
        "convert a Hugging Face checkpoint to a GRINQH checkpoint",
    ),
    "publish": (
        "checkpoints_tools.publish.command",
        "write measured results into a model card, and upload a checkpoint to the hub",
    ),
}
"""Verb -> (module with ``main(argv) -> exit code``, one-line help).

A module is imported when its verb runs: ``--help`` stays fast, and this package does not depend on
``checkpoints_tools``, which is above it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns its exit code (see ``cli.command``)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["-h"], ["--help"]):
        return command.guarded(lambda: _print(_help()))
    if argv[:1] == ["--version"]:
        return command.guarded(lambda: _print(f"grinqh-jax {__version__}"))
    if not argv or argv[0] not in VERBS:
        print(f"error: {_verb_problem(argv)} (see grinqh-jax --help)", file=sys.stderr)
        return command.USAGE_ERROR
    module = importlib.import_module(VERBS[argv[0]][0])
    return module.main(argv[1:])


def _verb_problem(argv: Sequence[str]) -> str:
    verbs = f"choose from {', '.join(VERBS)}"
    if not argv:
        return f"no verb given; {verbs}"
    if argv[0].startswith("-"):
        return f"a verb comes first, before {argv[0]}; {verbs}"
    return f"unknown verb {argv[0]!r}{command.did_you_mean(command.closest(argv[0], VERBS)) or f'; {verbs}'}"


def _help() -> str:
    verbs = "\n".join(f"  {verb:<12}{purpose}" for verb, (_, purpose) in VERBS.items())
    return (
        "usage: grinqh-jax VERB [flags]\n\n"
        "Decode large language models from nested bit planes at 1 to 8 bits per weight.\n\n"
        f"verbs:\n{verbs}\n\n"
        "grinqh-jax VERB --help lists the flags of a verb; grinqh-jax --version prints the version."
    )


def _print(text: str) -> int:
    print(text)
    return 0


def run() -> NoReturn:
    """Runs the command line and ends the process."""
    command.leave(main())


if __name__ == "__main__":
    run()
