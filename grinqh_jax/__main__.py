"""``python -m grinqh_jax VERB`` and ``grinqh-jax VERB``: the verbs and where they are."""

import importlib
import sys
from collections.abc import Sequence

from grinqh_jax import __version__
from grinqh_jax.cli import command as cli

VERBS = {
    "generate": ("grinqh_jax.cli.generate", "text from a prompt"),
    "chat": ("grinqh_jax.cli.chat", "a conversation in the terminal"),
    "perplexity": ("grinqh_jax.cli.perplexity", "perplexity and KL at settings of the dial"),
    "evaluate": ("grinqh_jax.cli.evaluate", "accuracy on word problems, likewise"),
    "lm-eval": ("grinqh_jax.cli.lm_eval", "tasks of lm-evaluation-harness (extra: eval)"),
    "benchmark": ("grinqh_jax.cli.benchmark", "prompt and generation speed at settings of the dial"),
    "convert": ("checkpoints_tools.convert.command", "a Hugging Face checkpoint to a GRINQH checkpoint"),
}
"""Verb -> (module with ``main(argv) -> exit code``, what it does). A module is imported when its
verb is used: the others' dependencies cost no time, and the context stays above this package."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns its exit code (see ``cli``)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    verbs = "\n".join(f"  {verb:<12}{purpose}" for verb, (_, purpose) in VERBS.items())
    usage = f"usage: grinqh-jax VERB [flags]\n\n{verbs}\n\ngrinqh-jax VERB --help lists a verb's flags"
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if argv[:1] == ["--version"]:
        print(f"grinqh-jax {__version__}")
        return 0
    if not argv or argv[0] not in VERBS:
        wrong = f"unknown verb {argv[0]!r}" if argv else "no verb given"
        print(f"error: {wrong}; choose from {', '.join(VERBS)} (see grinqh-jax --help)", file=sys.stderr)
        return cli.USAGE_ERROR
    module = importlib.import_module(VERBS[argv[0]][0])
    return module.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
