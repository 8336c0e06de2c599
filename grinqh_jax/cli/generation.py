"""Loads a generator and prints the statistics of a generation, for ``generate`` and ``chat``."""

import sys

from grinqh_jax.cli import command


def load_generator(model: str):
    """Loads the ``Generator`` of ``--model`` under a status line."""
    with command.status(f"loading {model}"):
        from grinqh_jax.decoding.generator import Generator

        return Generator.load(model)


def print_statistics(statistics, interrupted: bool = False) -> None:
    """Prints the ``Statistics`` of a generation, and its warning if there is one, on stderr."""
    if interrupted:
        print("interrupted", file=sys.stderr)
    for line in statistics.lines():
        print(line, file=sys.stderr)
    if warning := statistics.warning():
        print(f"warning: {warning}", file=sys.stderr)
