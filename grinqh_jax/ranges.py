"""Ranges of numbers, and messages about them with numbers written for people."""

import dataclasses
import math

_LARGE = 1e6
"""Smallest upper limit that a message about a number below the range leaves out, because it does not help."""


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
        """Returns the end of a message about ``value``, which is outside: the numbers that are expected."""
        advice = Range(self.least, math.inf) if value < self.least and self.most >= _LARGE else self
        return f"expected {advice}"


def readable(value: float) -> str:
    """Returns a number as people write it: ``2,147,483,647``, ``0.000001``, ``0.5``."""
    if not math.isfinite(value) or (value != 0 and not 1e-9 <= abs(value) < 1e15):
        return f"{value:g}"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.9f}".rstrip("0")
