"""Phase multiply: from the ring and the codes through the matrix unit to int32 sums."""

import dataclasses

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import BLOCK_BYTES, DenseRowsGeometry
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import LaneContext, in_ring, slot_offset
from pallas_kernels.matvec.mosaic_gpu.streaming import POSITION_MASKS

EVEN_BYTES, ODD_BYTES = 0x6420, 0x7531
"""Selectors that gather the bytes of equal parity of two words."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """Loads of the operands of a step."""

    isa: Instructions
    g: DenseRowsGeometry
    piece: Value
    """Address of the lane's plane row in the warp's piece, in the first plane of slot 0."""
    codes: list[Value]
    """For each pair of row tiles, the address of the lane's codes in plane 0 of the first chunk. With
    ``warpgroups`` the address of all codes."""

    @classmethod
    def create(cls, isa: Instructions, g: DenseRowsGeometry, context: LaneContext) -> "Operands":
        """Computes the addresses of the lane."""
        return cls(
            isa,
            g,
            piece=in_ring(context.shared + g.ring_base, context.lane, context.warp),
            # The maximum tells the compiler that the whole warp has the same address.
            codes=[isa.reduce_max(context.shared)]
            if g.dense.warpgroups
            else [
                context.shared + (t << 8) + (context.lane << (4 if t + 1 < g.row_tiles else 3))
                for t in range(0, g.row_tiles, 2)
            ],
        )

    def load(self, item: Value, section: Value, step: int) -> list[Value]:
        """Loads the words of A, ``[plane][4]``, and the codes, ``[plane][row tile][2]``, of a step.

        With ``warpgroups`` only the words: the matrix unit reads the codes from shared memory.

        Args:
          item: Index of the item.
          section: Index of its section.
          step: Step of the section.
        """
        isa, g = self.isa, self.g
        slot = slot_offset(g, item, step)
        chunk, planes = g.steps[step]
        words, codes = [], []
        first = section * (g.section_chunks * g.chunk_bytes) + chunk * g.chunk_bytes
        for n, f in enumerate(planes):
            words += isa.load_matrices_transposed(self.piece + slot + n * BLOCK_BYTES, unwritten=True)
            if g.dense.warpgroups:
                continue
            for t, address in zip(range(0, g.row_tiles, 2), self.codes, strict=True):
                count = 4 if t + 1 < g.row_tiles else 2
                codes += isa.load_shared(address + first + f * g.unit_bytes, count)
        return words + codes

    def section_codes(self, section: Value) -> Value:
        """Returns the address of the codes of a section, with ``warpgroups``."""
        return self.codes[0] + section * (self.g.section_chunks * self.g.chunk_bytes)


def multiply(
    isa: Instructions,
    g: DenseRowsGeometry,
    accumulators: list[Value],
    step: int,
    operands: list[Value],
    section_codes: Value | None,
) -> list[Value]:
    """Multiplies a step of a section.

    Args:
      isa, g: The instructions and sizes.
      accumulators: int32 ``[row tile][position][4]``, flat.
      step: The step.
      operands: See ``Operands.load``.
      section_codes: Address of the codes of the section, with ``warpgroups``.

    Returns:
      The new accumulators. With ``warpgroups`` only the next step, or ``finish``, may use them.
    """
    if section_codes is not None:
        return multiply_by_warpgroup(isa, g, accumulators, step, operands, section_codes)
    planes = len(g.steps[step][1])
    codes = operands[4 * planes :]
    out = list(accumulators)
    for n in range(planes):
        a = gather_bytes(isa, operands[4 * n :][:4])
        for p, mask in enumerate(POSITION_MASKS):
            masked = [word & mask for word in a] if p else a
            for t in range(g.row_tiles):
                i = accumulator(t, p)
                b = codes[2 * (n * g.row_tiles + t) :][:2]
                out[i : i + 4] = isa.matrix_multiply_add(out[i : i + 4], masked, b)
    return out


def multiply_by_warpgroup(
    isa: Instructions,
    g: DenseRowsGeometry,
    accumulators: list[Value],
    step: int,
    operands: list[Value],
    section_codes: Value,
) -> list[Value]:
    """Multiplies a step like ``multiply``.

    The matrix unit multiplies a plane while the warp waits for the next step, and masks the next plane.
    """
    sums = by_position(g, accumulators)
    chunk, planes = g.steps[step]
    for n, f in enumerate(planes):
        a = gather_bytes(isa, operands[4 * n :][:4])
        matrices = [a, *([word & mask for word in a] for mask in POSITION_MASKS[1:])]
        offset = chunk * g.chunk_bytes + f * g.unit_bytes
        sums = isa.queue_warpgroup_multiply_add(sums, matrices, section_codes, offset)
    return by_row_tile(g, sums)


def finish(isa: Instructions, g: DenseRowsGeometry, accumulators: list[Value]) -> list[Value]:
    """Waits until all steps of a section are multiplied, and returns the accumulators."""
    if not g.dense.warpgroups:
        return accumulators
    return by_row_tile(g, isa.finish_warpgroup_multiply_add(by_position(g, accumulators)))


def by_position(g: DenseRowsGeometry, accumulators: list[Value]) -> list[list[Value]]:
    """Returns the accumulators as the operands C of a warpgroup, ``[position][row tile, 4]``."""
    positions = range(len(POSITION_MASKS))
    return [[v for t in range(g.row_tiles) for v in accumulators[accumulator(t, p) :][:4]] for p in positions]


def by_row_tile(g: DenseRowsGeometry, sums: list[list[Value]]) -> list[Value]:
    """Undoes ``by_position``."""
    return [v for t in range(g.row_tiles) for of_position in sums for v in of_position[4 * t : 4 * t + 4]]


def accumulator(row_tile: int, position: int) -> int:
    """Returns the index of the first of four accumulators of a row tile and digit position."""
    return 16 * row_tile + 4 * position


def gather_bytes(isa: Instructions, words: list[Value]) -> list[Value]:
    """Returns the registers of an operand A from the four words of ``load_matrices_transposed``.

    A word holds two neighbouring bytes of two channels, so two words give four channels of either byte. Row
    ``r`` of A is byte ``2 r`` of the 16, row ``r + 8`` byte ``2 r + 1``.
    """
    return [
        isa.permute_bytes(low, high, selector)
        for low, high in (words[:2], words[2:])
        for selector in (EVEN_BYTES, ODD_BYTES)
    ]
