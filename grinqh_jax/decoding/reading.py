"""The rule that chooses how a decode step reads the weights of a graded model.

Up to ``MAX_GRADED_ROWS`` rows are graded: each row reads each input channel at its own level, and its result
does not depend on the other rows. The more rows there are, the more channels some row reads at a high level.
A larger batch therefore reads all channels at one level, with ``level_matmul``, whose tuning table chooses
between its kernel and dequantization. The level has at least the bits that every row asks for, and at least
``LEAST_LEVEL`` digits.
"""

import math
from collections.abc import Iterable
from typing import Literal

from pallas_kernels.layout import DIGIT_BITS

MAX_GRADED_ROWS = 16
"""Largest number of rows that are graded: as many as the kernel of the graded matvec reads together."""

LEAST_LEVEL = 3
"""Lowest level of large batches, because grading at 3 bits still reads important channels with 6 or 8."""

WeightReading = Literal["graded", "one level", "dense"]
"""How decode steps read weights: ``"dense"`` in an unquantized model."""


def possible_levels(rows: int, num_planes: int) -> list[int | None]:
    """Returns the levels that ``batch_level`` may choose for a batch; None for grading."""
    if rows <= MAX_GRADED_ROWS:
        return [None]
    return list(range(min(LEAST_LEVEL, num_planes), num_planes + 1))


def batch_level(rows: int, bits: Iterable[float], num_planes: int) -> int | None:
    """Returns the level at which a decode step reads all input channels, or None if it grades each row.

    Args:
      rows: Number of rows of the step, of which some may be empty.
      bits: Wanted mean bits of each row that is not empty.
      num_planes: Number of digits of the codes.
    """
    if rows <= MAX_GRADED_ROWS:
        return None
    wanted = math.ceil(max(bits, default=0) / DIGIT_BITS)
    return min(max(wanted, LEAST_LEVEL), num_planes)
