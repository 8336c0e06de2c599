"""What lies between two graded products of a decode step, as lane programs over rows of activations."""

import dataclasses
import math
from typing import Any

from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.lanes.rows import (
    Rows,
    load_bfloat16_pair,
    locate,
    store_part_of_sum,
    store_rounded,
    sum_of_pairs,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes: the rows that are computed, and the partial sums that they are computed from."""

    rows: Rows
    parts: int
    stored_columns: int
    """Columns of the partial sums, padding included."""

    def index(self, row: Value, column: Value) -> Value:
        """Of a number in the first part."""
        return row * self.stored_columns + column

    @property
    def stride(self) -> int:
        """Numbers from one part to the next."""
        return self.rows.rows * self.stored_columns


@dataclasses.dataclass(frozen=True)
class AddNormRefs:
    """``x bf16 [rows, N]``, ``parts f32 [parts, rows, columns]``, ``gain bf16 [N]``; written: ``total`` and
    ``values bf16 [rows, N]`` and ``squares f32 [rows, row parts]``."""

    x: Any
    parts: Any
    gain: Any
    total: Any
    values: Any
    squares: Any
    shared: Any


def add_norm_program(isa: Instructions, shape: Shape, refs: AddNormRefs) -> None:
    """``total = x + sum(parts)``, ``values = total * gain``, and what the norm needs of them."""
    rows = shape.rows
    at = locate(isa, rows)
    x = load_bfloat16_pair(isa, refs.x, at.row * rows.columns + at.column)
    gain = load_bfloat16_pair(isa, refs.gain, at.column)
    update = sum_of_pairs(isa, refs.parts, shape.index(at.row, at.column), shape.stride, shape.parts)
    total = store_rounded(isa, rows, at, refs.total, [a + b for a, b in zip(x, update, strict=True)])
    store_rounded(isa, rows, at, refs.values, [a * b for a, b in zip(total, gain, strict=True)])
    square = isa.multiply_add(total[0], total[0], total[1] * total[1]) * (1 / rows.columns)
    store_part_of_sum(isa, rows, at, refs.shared, refs.squares, square)


@dataclasses.dataclass(frozen=True)
class SwigluRefs:
    """``parts f32 [parts, rows, columns]``, the gate's outputs and then up's; written: ``values bf16 [rows,
    N]``."""

    parts: Any
    values: Any
    shared: Any


def swiglu_program(isa: Instructions, shape: Shape, refs: SwigluRefs) -> None:
    """``values = silu(gate) * up``, with ``silu(a) = a / (1 + exp(-a))``."""
    rows = shape.rows
    at = locate(isa, rows)
    first = shape.index(at.row, at.column)
    gate = sum_of_pairs(isa, refs.parts, first, shape.stride, shape.parts)
    up = sum_of_pairs(isa, refs.parts, first + rows.columns, shape.stride, shape.parts)
    activated = [
        isa.divide(a * b, isa.exp2(a * -math.log2(math.e)) + 1.0) for a, b in zip(gate, up, strict=True)
    ]
    store_rounded(isa, rows, at, refs.values, activated)
