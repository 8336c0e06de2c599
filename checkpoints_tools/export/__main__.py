"""``python -m checkpoints_tools.export``: a checkpoint as safetensors files, or these as a checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools.export.exchange import INDEX, read_safetensors, write_safetensors
from grinqh_jax.cli import command as cli


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    result = cli.Parser(
        prog="python -m checkpoints_tools.export",
        description="Write a GRINQH checkpoint as safetensors files with a quantization_config, for programs "
        "without Orbax; or, if --model has such files, write the checkpoint. All bits stay the same.",
    )
    add = result.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="GRINQH checkpoint, or its exported form")
    add("--out", required=True, type=Path, metavar="DIR", help="directory to make")
    return result


def run(args: argparse.Namespace) -> int:
    """Writes the other form of a checkpoint."""
    back = (args.model / INDEX).is_file()
    out = (read_safetensors if back else write_safetensors)(args.model, args.out)
    print(f"{out}: {'a GRINQH checkpoint' if back else 'safetensors files'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code (see ``grinqh_jax.cli.command``)."""
    return cli.run(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
