"""``python -m checkpoints_tools.migrate``: a checkpoint of an older format version in the present one.

The library reads every version, so this only makes the files smaller. The weights stay the same.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools.convert.sizes import directory_bytes
from checkpoints_tools.migrate.rewriting import migrate
from grinqh_jax.checkpoint.quantization import VERSION
from grinqh_jax.cli import command as cli


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    result = cli.Parser(
        prog="python -m checkpoints_tools.migrate",
        description="Write a GRINQH checkpoint in the present version of the format. Weights and predictions "
        "stay the same; layers whose outputs are not a multiple of 512 take fewer bytes.",
    )
    add = result.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="GRINQH checkpoint of any version")
    add("--out", required=True, type=Path, metavar="DIR", help="directory to make; may be that of --model")
    add("--force", action="store_true", help="replace the checkpoint at --out")
    return result


def run(args: argparse.Namespace) -> int:
    """Migrates as the flags say, and prints the sizes of both checkpoints."""
    before = directory_bytes(args.model)
    out = migrate(args.model, args.out, overwrite=args.force)
    print(
        f"{out}: format version {VERSION}, {directory_bytes(out) / 1e6:,.1f} MB on disk"
        f" instead of {before / 1e6:,.1f} MB"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code (see ``grinqh_jax.cli.command``)."""
    return cli.run(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
