"""Differences between settings measured on the same windows, with their paired standard errors."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from checkpoints_tools.pareto.rows import Row, windows
from grinqh_jax.evaluation.result import standard_error


def difference(row: Row, other: Row) -> tuple[float, float | None]:
    """``row``'s perplexity less ``other``'s, and its paired standard error (None for a single window).

    Both on the same text in the same windows; ``exp`` is taken to first order.
    """
    (losses, tokens), (other_losses, _) = windows(row), windows(other)
    own, others = (math.exp(sums.sum() / tokens.sum()) for sums in (losses, other_losses))
    return own - others, standard_error(own * losses - others * other_losses, tokens)


def steps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each turn of the dial to more bits does to perplexity.

    Args:
      rows: one text's, by ascending bits.

    Returns:
      One object a step: ``from`` and ``to`` bits, ``difference`` of the perplexities (above 0 where it
      rises), its paired ``difference_stderr``, and two verdicts: ``rises``, by more than the standard error
      of the perplexity itself, and ``rises_paired``, by more than the paired one. Where more bits change
      next to nothing the second is so small that one step in six exceeds it by chance.
    """
    found = []
    for before, after in itertools.pairwise(rows):
        rise, error = difference(after, before)
        found.append(
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
    return found


def comparisons(rows: Sequence[Row], others: Sequence[Row], full: Row) -> list[dict[str, Any]]:
    """Every row against every other on one text.

    Returns:
      One object a pair: ``difference`` of the perplexities, below 0 where ``bits`` beats ``against``, its
      paired ``difference_stderr``, and ``loss_ratio``, the ratio of what both lose against ``full``
      (None where the other loses nothing).
    """
    found = []
    for row in rows:
        for other in others:
            gain, error = difference(row, other)
            lost, other_lost = (r["perplexity"] - full["perplexity"] for r in (row, other))
            found.append(
                {
                    "data": row["data"],
                    "label": row["label"],
                    "bits": row["bits"],
                    "against": other["label"],
                    "against_bits": other["bits"],
                    "difference": gain,
                    "difference_stderr": error,
                    "loss_ratio": lost / other_lost if other_lost > 0 else None,
                }
            )
    return found
