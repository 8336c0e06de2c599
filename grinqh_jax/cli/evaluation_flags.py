"""Flags and output that the measuring commands share."""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from grinqh_jax.cli import flags
from grinqh_jax.errors import UsageError

DEFAULT_BITS: tuple[float | str, ...] = (2.0, 3.0, 4.0, "full")


def add_bits(parser: argparse.ArgumentParser) -> None:
    """Adds ``--bits`` with a list, and ``--json``."""
    parser.add_argument(
        "--bits",
        type=bits_list,
        metavar="B,B,...",
        help="settings of the dial, mean bits read per weight or full (default 2,3,4,full; "
        "an unquantized model: full)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")


def bits_list(text: str) -> list[float | str]:
    """An argparse type: settings of the dial, comma-separated, each once."""
    return list(dict.fromkeys(flags.bits(part.strip()) for part in text.split(",")))


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def settings(wanted: Sequence[float | str] | None, generator) -> list[float | str]:
    """The settings to measure, checked against the model that ``generator`` holds.

    Raises:
      UsageError: naming every setting that the model does not have.
    """
    if wanted is None:
        if generator.targets is None:
            return ["full"]
        least, most = generator.targets[0], generator.targets[-1]
        return [bits for bits in DEFAULT_BITS if bits == "full" or least <= bits <= most]
    problems = []
    for bits in wanted:
        try:
            generator.bits(bits)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
    return list(wanted)


@runtime_checkable
class Result(Protocol):
    """What a command found at one setting of the dial."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        ...

    def cells(self) -> dict[str, Any]:
        """For people: the columns of a table, the same for all results of a command."""
        ...


def show(results: Iterable[Result], as_json: bool) -> None:
    """Prints results: JSON objects, each as soon as it is there, or a table when all are."""
    if as_json:
        for result in results:
            print(json.dumps(result.to_json()), flush=True)
        return
    rows = [result.cells() for result in results]
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
