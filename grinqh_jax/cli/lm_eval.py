"""The verb ``lm-eval``: the command line of lm-evaluation-harness with the model type ``grinqh``."""

import sys
from collections.abc import Sequence

from grinqh_jax.cli import command
from grinqh_jax.errors import UsageError

_HELP = """usage: grinqh-jax lm-eval --model grinqh --model_args pretrained=DIR,bits=B --tasks TASK ...

Run tasks of lm-evaluation-harness on a GRINQH checkpoint. All flags are the harness's
own (grinqh-jax lm-eval run --help lists them).
Needs the extra eval: pip install 'grinqh-jax[eval]'.

options:
  --model_args ARGS  pretrained (directory or hub id), bits (a number or full),
                     max_length, max_gen_toks, dtype (float32, bfloat16 or auto)
  --batch_size N     largest number of requests read together; the harness's default
                     of 1 is slow"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the harness on its own flags; returns the exit code (see ``command``)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return command.guarded(lambda: _lm_eval(argv))


def _lm_eval(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    try:
        from lm_eval.__main__ import cli_evaluate

        from grinqh_jax.evaluation import harness  # noqa: F401, registers the model
    except ImportError as error:
        raise UsageError(
            f"lm-evaluation-harness is not installed ({error}): pip install 'grinqh-jax[eval]'"
        ) from None
    sys.argv = ["lm-eval", *argv]  # cli_evaluate reads sys.argv
    cli_evaluate()
    return 0
