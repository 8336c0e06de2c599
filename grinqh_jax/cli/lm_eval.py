"""``python -m grinqh_jax lm-eval``: the command line of lm-evaluation-harness, with ``--model grinqh``."""

import sys
from collections.abc import Sequence

from grinqh_jax.cli import command as cli
from grinqh_jax.errors import GrinqhError

_USAGE = """usage: grinqh-jax lm-eval --model grinqh --model_args pretrained=DIR,bits=B --tasks TASK ...

The command line of lm-evaluation-harness (grinqh-jax lm-eval run --help lists its flags), which knows
GRINQH checkpoints as --model grinqh. Needs the extra eval: pip install 'grinqh-jax[eval]'.

--model_args: pretrained (directory or hub id), bits (a number or full), max_length, max_gen_toks
--batch_size: most requests at a time; the harness's default of 1 is slow"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the harness with its own flags; returns its exit code (see ``cli``)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    try:
        from lm_eval.__main__ import cli_evaluate

        from grinqh_jax.evaluation import harness  # noqa: F401, registers the model
    except ImportError as error:
        print(
            f"error: lm-evaluation-harness is not installed ({error}): pip install 'grinqh-jax[eval]'",
            file=sys.stderr,
        )
        return cli.USAGE_ERROR
    sys.argv = ["lm-eval", *argv]  # it reads no other arguments
    try:
        cli_evaluate()
    except GrinqhError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
