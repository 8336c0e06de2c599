"""Ranges of numbers, and messages about them in figures that people read."""

import dataclasses
import math

_LARGE = 1e6
"""A limit from here on is no advice, so a message about too small a number leaves it out."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``, both included."""

    least: float
    most: float

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        if math.isinf(self.most):
            return f"{readable(self.least)} or more"
        return f"{readable(self.least)} to {readable(self.most)}"

    def expected(self, value: float) -> str:
        """Returns which numbers are expected instead of ``value``, which is outside."""
        advice = Range(self.least, math.inf) if value < self.least and self.most >= _LARGE else self
        return f"expected {advice}"


def readable(value: float) -> str:
    """Returns a number as people write it: ``2,147,483,647``, ``0.000001``, ``0.5``."""
    if not math.isfinite(value) or (value != 0 and not 1e-9 <= abs(value) < 1e15):
        return f"{value:g}"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.9f}".rstrip("0")
