"""Differences between settings measured on the same windows, with paired standard errors."""

import itertools
from collections.abc import Sequence
from typing import Any

from checkpoints_tools.pareto.rows import Row, windows
from grinqh_jax.evaluation.result import exp, standard_error


def difference(row: Row, other: Row) -> tuple[float, float | None]:
    """Returns ``row``'s perplexity minus ``other``'s, and its paired standard error.

    Both rows must come from the same windows of the same text. The error is None for a single window; it is
    computed to first order in the losses.
    """
    (losses, tokens), (other_losses, _) = windows(row), windows(other)
    value, other_value = (exp(sums.sum() / tokens.sum()) for sums in (losses, other_losses))
    return value - other_value, standard_error(value * losses - other_value * other_losses, tokens)


def steps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Compares the perplexities of consecutive settings of the dial.

    Args:
      rows: Rows of one text, by ascending bits.

    Returns:
      One object for each step: ``from`` and ``to`` bits, ``difference`` of the perplexities (positive if
      perplexity rises), its paired ``difference_stderr``, and two verdicts. ``rises``: perplexity rises by
      more than its standard error. ``rises_paired``: it rises by more than the paired standard error. Where
      more bits change almost nothing, one step in six exceeds the paired error by chance.
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
      One object for each pair: ``difference`` of the perplexities, negative if the row is better than the
      other; its paired ``difference_stderr``; and ``loss_ratio``, the perplexity that the row loses against
      full precision, divided by the loss of the other row (None if the other row loses nothing).
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
