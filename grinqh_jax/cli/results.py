"""Prints the results of ``perplexity`` and ``evaluate``, as a table or as JSON lines."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from grinqh_jax.json_files import json_line


@runtime_checkable
class Result(Protocol):
    """The result of a measurement at one setting of the dial."""

    def to_json(self) -> dict[str, Any]:
        """Returns the fields of a JSON object."""
        ...

    def cells(self) -> dict[str, Any]:
        """Returns the cells of a table row by column title. All results of a verb have the same columns."""
        ...


def show(results: Iterable[Result], as_json: bool, common: Mapping[str, Any] | None = None) -> None:
    """Prints each result as a JSON object as soon as it is measured, or all of them as one table.

    Args:
      results: Results of a verb.
      as_json: Whether to print JSON.
      common: Fields to add to every JSON object.
    """
    if as_json:
        for result in results:
            print(json_line(result.to_json() | dict(common or {})), flush=True)
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
