"""Prints the results of the measuring verbs, as a table or as JSON lines."""

import json
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable


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
