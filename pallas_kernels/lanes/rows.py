"""Lane programs that compute rows of activations element by element and leave a sum over them in parts.

Each lane has two neighbouring columns, each CTA a piece of one row, and no CTA waits for another: a sum over
the whole row is left in parts, one for each CTA of the row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.lanes.launch import WARPGROUP

MOST_PARTS = 64
"""Wanted at most: every warp of the next kernel adds them up."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How ``rows`` rows of ``columns`` columns (an even number) are cut into CTAs."""

    rows: int
    columns: int

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return WARPGROUP * -(-self.columns // (2 * WARPGROUP * MOST_PARTS))

    @property
    def parts(self) -> int:
        """CTAs to a row, hence parts of its sums."""
        return -(-self.columns // (2 * self.threads))

    @property
    def blocks(self) -> int:
        return self.rows * self.parts

    @property
    def shared_bytes(self) -> int:
        """Room for one word of each warp."""
        return 4 * self.threads // LANES


@dataclasses.dataclass(frozen=True)
class Columns:
    """A lane's two columns."""

    row: Value
    column: Value
    """The first of them; a valid one also where the lane has none."""
    inside: Value
    """Whether the lane has any."""
    part: Value
    """Of the row's sums."""
    thread: Value


def locate(isa: Instructions, rows: Rows) -> Columns:
    """The lane's columns."""
    block, thread = isa.block_index(), isa.thread_index()
    row, part = (isa.constant(0), block) if rows.rows == 1 else (block // rows.parts, block % rows.parts)
    column = part * (2 * rows.threads) + thread * 2
    inside = column < rows.columns
    return Columns(row, isa.select(inside, column, isa.constant(0)), inside, part, thread)


def load_pair(isa: Instructions, ref: Any, index: Value, *, early: bool = False) -> list[Value]:
    """Two neighbouring ``f32``, the first one at ``index``, an even one; ``early``: see ``load_global``."""
    return isa.load_global(isa.global_address(ref) + isa.widen(index << 2), 2, "f32", early=early)


def load_bfloat16_pair(isa: Instructions, ref: Any, index: Value) -> list[Value]:
    """Two neighbouring bfloat16 as ``f32``, the first one at ``index``, which is even."""
    return unpack_bfloat16(isa, isa.load_global(isa.global_address(ref) + isa.widen(index << 1))[0])


def sum_of_pairs(
    isa: Instructions, ref: Any, first: Value, stride: int, count: int, *, early: bool = False
) -> list[Value]:
    """Sum, from the first to the last, of ``count`` pairs of ``f32`` that are ``stride`` numbers apart."""
    pairs = [load_pair(isa, ref, first + i * stride, early=early) for i in range(count)]
    total = pairs[0]
    for pair in pairs[1:]:
        total = [a + b for a, b in zip(total, pair, strict=True)]
    return total


def unpack_bfloat16(isa: Instructions, word: Value) -> list[Value]:
    """The two bfloat16 of a word, exactly."""
    return [isa.bits_to_float(word << 16), isa.bits_to_float(word & 0xFFFF0000)]


def store_rounded(
    isa: Instructions, rows: Rows, at: Columns, target: Any, numbers: Sequence[Value]
) -> list[Value]:
    """Stores the two columns as bfloat16; the rounded numbers, zero where the lane has no columns."""
    word = isa.pack_bfloat16(*numbers)
    with isa.when(at.inside):
        index = at.row * rows.columns + at.column
        isa.store_global(isa.global_address(target) + isa.widen(index << 1), [word])
    return unpack_bfloat16(isa, isa.select(at.inside, word, isa.constant(0)))


def store_part_of_sum(
    isa: Instructions, rows: Rows, at: Columns, shared: Any, target: Any, number: Value
) -> None:
    """Adds up what the CTA's lanes have, in a fixed order, and stores the part in ``f32 [rows, parts]``."""
    base = isa.shared_address(shared)
    lane, warp = at.thread & (LANES - 1), at.thread >> 5
    for distance in (1, 2, 4, 8, 16):
        number = number + isa.shuffle_xor(number, distance)
    isa.store_shared(base + (warp << 2), [isa.float_to_bits(number)], where=lane.equals(0))
    isa.block_barrier()
    with isa.when(at.thread.equals(0)):
        total, *others = [isa.load_shared(base + 4 * w, 1, "f32")[0] for w in range(rows.threads // LANES)]
        for other in others:
            total = total + other
        offset = isa.widen((at.row * rows.parts + at.part) << 2)
        isa.store_global(isa.global_address(target) + offset, [total])
