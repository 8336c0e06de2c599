"""Helpers for lane programs on rows of activations. A lane computes two features, a CTA a part of one row.

No CTA waits for another. For a sum over a whole row, each CTA of the row therefore writes a partial sum, and
the next kernel adds them up.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.launch import WARPGROUP
from pallas_kernels.lanes.registers import Value

MAX_BLOCKS_PER_ROW = 64
"""Largest number of CTAs that share a row. It is bounded because every warp of the next kernel adds up their
partial sums."""

PARTIALS_PER_LANE = 16
"""Largest number of partial sums of a mean square that every lane adds up for itself."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows of activations are cut into CTAs.

    Attributes:
      rows: Number of rows.
      features: Number of features in a row, an even number.
    """

    rows: int
    features: int

    @property
    def threads(self) -> int:
        """Number of threads in a CTA."""
        return WARPGROUP * -(-self.features // (2 * WARPGROUP * MAX_BLOCKS_PER_ROW))

    @property
    def blocks_per_row(self) -> int:
        """Number of CTAs that share a row, which is also the number of partial sums of the row."""
        return -(-self.features // (2 * self.threads))

    @property
    def blocks(self) -> int:
        """Number of CTAs."""
        return self.rows * self.blocks_per_row

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a CTA: one word for each warp."""
        return 4 * self.threads // LANES


@dataclasses.dataclass(frozen=True)
class FeaturePair:
    """The lane's two neighbouring features of a row."""

    row: Value
    feature: Value
    """Index of the first feature; 0 if the lane has none."""
    exists: Value
    """Whether the lane has features."""
    block_of_row: Value
    """Index of the CTA among those of the row."""
    thread: Value


def locate(isa: Instructions, rows: Rows) -> FeaturePair:
    """Returns the lane's features."""
    block, thread = isa.block_index(), isa.thread_index()
    if rows.rows == 1:
        row, block_of_row = isa.constant(0), block
    else:
        row, block_of_row = block // rows.blocks_per_row, block % rows.blocks_per_row
    feature = block_of_row * (2 * rows.threads) + thread * 2
    exists = feature < rows.features
    return FeaturePair(row, isa.select(exists, feature, isa.constant(0)), exists, block_of_row, thread)


def load_pair(isa: Instructions, ref: Any, index: Value, *, ordered: bool = False) -> list[Value]:
    """Loads two neighbouring ``f32``, the first at the even ``index``; ``ordered`` as in ``load_global``."""
    return isa.load_global(isa.global_address(ref) + isa.widen(index << 2), 2, "f32", ordered=ordered)


def load_bfloat16_pair(isa: Instructions, ref: Any, index: Value) -> list[Value]:
    """Loads two neighbouring bfloat16 as ``f32``, the first at the even ``index``."""
    return unpack_bfloat16(isa, isa.load_global(isa.global_address(ref) + isa.widen(index << 1))[0])


def sum_pairs(
    isa: Instructions,
    ref: Any,
    first: Value,
    stride: int,
    count: int,
    *,
    ordered: bool = False,
    terms: int = 1,
    term_stride: int = 0,
) -> list[Value]:
    """Adds up ``count`` pairs of ``f32``, from the first to the last, that lie ``stride`` numbers apart.

    If there are several ``terms``, each pair stands for that many, which lie ``term_stride`` numbers apart.
    """
    offsets = [i * stride + j * term_stride for i in range(count) for j in range(terms)]
    pairs = [load_pair(isa, ref, first + offset, ordered=ordered) for offset in offsets]
    total = pairs[0]
    for pair in pairs[1:]:
        total = [a + b for a, b in zip(total, pair, strict=True)]
    return total


def unpack_bfloat16(isa: Instructions, word: Value) -> list[Value]:
    """Converts the two bfloat16 of a word to ``f32`` exactly."""
    return [isa.bits_to_float(word << 16), isa.bits_to_float(word & 0xFFFF0000)]


def store_rounded(
    isa: Instructions, rows: Rows, pair: FeaturePair, target: Any, numbers: Sequence[Value]
) -> list[Value]:
    """Stores the lane's two features as bfloat16; returns them as stored, or zeros if the lane has none."""
    word = isa.pack_bfloat16(*numbers)
    with isa.when(pair.exists):
        index = pair.row * rows.features + pair.feature
        isa.store_global(isa.global_address(target) + isa.widen(index << 1), [word])
    return unpack_bfloat16(isa, isa.select(pair.exists, word, isa.constant(0)))


def sum_partials(isa: Instructions, ref: Any, row: Value, count: int) -> Value:
    """Sums one row of ``f32 [rows, count]`` in a fixed order.

    If there are few numbers, every lane loads all of them, four in one load. If there are many, they would
    take too many registers, so each lane loads some of them, and the warp adds them up.
    """
    first = isa.global_address(ref) + isa.widen(row * (4 * count))
    if count <= PARTIALS_PER_LANE:
        width = 4 if count % 4 == 0 else 1
        numbers = [v for i in range(0, count, width) for v in isa.load_global(first + 4 * i, width, "f32")]
        while len(numbers) > 1:
            half = len(numbers) // 2
            pairs = zip(numbers[:half], numbers[half : 2 * half], strict=True)
            numbers = [a + b for a, b in pairs] + numbers[2 * half :]
        return numbers[0]
    lane = isa.thread_index() & (LANES - 1)
    total = isa.constant(0.0, "f32")
    for begin in range(0, count, LANES):
        exists = lane < count - begin
        index = isa.select(exists, lane, isa.constant(0)) + begin
        (number,) = isa.load_global(first + isa.widen(index << 2), kind="f32")
        total = total + isa.select(exists, number, isa.constant(0.0, "f32"))
    for distance in (1, 2, 4, 8, 16):
        total = total + isa.shuffle_xor(total, distance)
    return total


def store_partial_sum(
    isa: Instructions, rows: Rows, pair: FeaturePair, shared: Any, target: Any, number: Value
) -> None:
    """Adds up ``number`` over the CTA in a fixed order; stores it in ``f32 [rows, blocks_per_row]``."""
    base = isa.shared_address(shared)
    lane, warp = pair.thread & (LANES - 1), pair.thread >> 5
    for distance in (1, 2, 4, 8, 16):
        number = number + isa.shuffle_xor(number, distance)
    isa.store_shared(base + (warp << 2), [isa.float_to_bits(number)], where=lane.equals(0))
    isa.block_barrier()
    with isa.when(pair.thread.equals(0)):
        total, *others = [isa.load_shared(base + 4 * w, 1, "f32")[0] for w in range(rows.threads // LANES)]
        for other in others:
            total = total + other
        offset = isa.widen((pair.row * rows.blocks_per_row + pair.block_of_row) << 2)
        isa.store_global(isa.global_address(target) + offset, [total])
