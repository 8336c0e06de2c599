"""The registers of a lane program, and the operations that Python's operators emit."""

import abc
from typing import Literal

Kind = Literal["i32", "i64", "f32", "bool"]
"""Type of a register. ``i32`` holds signed numbers, unsigned numbers or raw bits."""


class Value(abc.ABC):
    """One register of the lane.

    A Python number as the second operand becomes a constant of the first operand's kind.
    """

    kind: Kind

    @abc.abstractmethod
    def binary(self, operation: str, other: "Value | int | float") -> "Value":
        """Returns ``self <operation> other`` for one of the operations named below."""

    def __add__(self, other):
        return self.binary("add", other)

    __radd__ = __add__

    def __sub__(self, other):
        return self.binary("sub", other)

    def __mul__(self, other):
        return self.binary("mul", other)

    __rmul__ = __mul__

    def __and__(self, other):
        """Returns the bitwise and of integers or the logical and of ``bool``."""
        return self.binary("and", other)

    def __or__(self, other):
        return self.binary("or", other)

    def __xor__(self, other):
        return self.binary("xor", other)

    def __lshift__(self, other):
        return self.binary("shl", other)

    def __rshift__(self, other):
        """Shifts right and fills with zeros."""
        return self.binary("shr", other)

    def __floordiv__(self, other):
        """Divides ``i32`` as unsigned numbers."""
        return self.binary("div", other)

    def __mod__(self, other):
        """Returns the remainder of ``i32`` as unsigned numbers."""
        return self.binary("rem", other)

    def __lt__(self, other):
        """Compares integers as signed numbers; false for ``f32`` if either side is NaN."""
        return self.binary("lt", other)

    def __ge__(self, other):
        """Compares integers as signed numbers; false for ``f32`` if either side is NaN."""
        return self.binary("ge", other)

    def equals(self, other) -> "Value":
        """Compares integers for equality. (``==`` remains Python's comparison of objects.)"""
        return self.binary("eq", other)

    def __invert__(self):
        """Returns the logical not of a ``bool``."""
        return self.binary("xor", True)
