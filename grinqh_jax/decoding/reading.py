"""The rule that chooses how a decode step reads the weights of a graded model.

Up to ``MAX_GRADED_ROWS`` rows are graded: each row reads each input channel at its own level, and its result
does not depend on the other rows. The more rows there are, the more channels some row reads at a high level.
A larger batch therefore reads all channels at one level, with ``level_matmul``, whose tuning table chooses
between its kernel and dequantization. The level has at least the bits that every row asks for, and is about
as good as grading at those bits.
"""

import math
from collections.abc import Iterable
from typing import Literal

MAX_GRADED_ROWS = 16
"""Largest number of rows that are graded: as many as the kernel of the graded matvec reads together."""

EQUALLY_GOOD_BITS = {3: 4.0, 4: math.inf}
"""Levels of large batches, each with the mean bits up to which grading is not clearly better. At level 3 the
bundled model diverges from full precision by 0.0129 nats, graded at 4 bits by 0.0144, and at 5 bits by 0.0035
(``benchmarks/levels.py``). Levels 1 and 2 are worse than grading at 2 bits."""

WeightReading = Literal["graded", "one level", "dense"]
"""How decode steps read weights: ``"dense"`` in an unquantized model."""


def possible_levels(rows: int, num_planes: int) -> list[int | None]:
    """Returns the levels that ``batch_level`` may choose for a batch; None for grading."""
    if rows <= MAX_GRADED_ROWS:
        return [None]
    return [*sorted({min(level, num_planes) for level in EQUALLY_GOOD_BITS})]


def batch_level(rows: int, bits: Iterable[float], num_planes: int) -> int | None:
    """Returns the level at which a decode step reads all input channels, or None if it grades each row.

    Args:
      rows: Number of rows of the step, of which some may be empty.
      bits: Wanted mean bits of each row that is not empty.
      num_planes: Number of digits of the codes.
    """
    if rows <= MAX_GRADED_ROWS:
        return None
    wanted = max(bits, default=0)
    level = next(level for level, most in EQUALLY_GOOD_BITS.items() if wanted <= most)
    return min(level, num_planes)
