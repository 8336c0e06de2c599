"""Differences between settings measured on the same windows, with paired standard errors."""

import itertools
from collections.abc import Sequence
from typing import Any

from checkpoints_tools.pareto.rows import Row, windows
from grinqh_jax.evaluation.result import exp, standard_error


def difference(row: Row, other: Row) -> tuple[float, float | None]:
    """Returns ``row``'s perplexity minus ``other``'s, and its paired standard error.

    Both rows must come from the same windows of the same text. The error is None for a single window, and
    takes ``exp`` to first order.
    """
    (losses, tokens), (other_losses, _) = windows(row), windows(other)
    value, other_value = (exp(sums.sum() / tokens.sum()) for sums in (losses, other_losses))
    return value - other_value, standard_error(value * losses - other_value * other_losses, tokens)


def steps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Compares the perplexities of consecutive settings of the dial.

    Args:
      rows: Rows of one text, by ascending bits.

    Returns:
      One object for each step: ``from`` and ``to`` bits, ``difference`` of the perplexities (positive if it
      rises), its paired ``difference_stderr``, and two verdicts: ``rises``, by more than the standard error
      of the perplexity itself, and ``rises_paired``, by more than the paired one. Where more bits change
      almost nothing the paired error is so small that one step in six exceeds it by chance.
    """
    result = []
    for before, after in itertools.pairwise(rows):
        rise, error = difference(after, before)
        result.append(
            {
                "from": before["bits"],
                "to": after["bits"],
                "perplexity": after["perplexity"],
                "stderr": after["stderr"],
                "difference": rise,
                "difference_stderr": error,
                "rises": rise > (after["stderr"] or 0),
                "rises_paired": rise > (error or 0),
            }
        )
    return result


def comparisons(rows: Sequence[Row], others: Sequence[Row], full: Row) -> list[dict[str, Any]]:
    """Compares every row with every other row of one text.

    Args:
      rows: Rows to compare.
      others: Rows to compare them with.
      full: Row of full precision.

    Returns:
      One object for each pair: ``difference`` of the perplexities, negative where ``bits`` beats ``against``;
      its paired ``difference_stderr``; and ``loss_ratio``, the ratio of the two losses against full precision
      (None if the other row loses nothing).
    """
    result = []
    for row in rows:
        for other in others:
            change, error = difference(row, other)
            lost, other_lost = (r["perplexity"] - full["perplexity"] for r in (row, other))
            result.append(
                {
                    "data": row["data"],
                    "label": row["label"],
                    "bits": row["bits"],
                    "against": other["label"],
                    "against_bits": other["bits"],
                    "difference": change,
                    "difference_stderr": error,
                    "loss_ratio": lost / other_lost if other_lost > 0 else None,
                }
            )
    return result
