"""Phase multiply: from the ring and the codes through the matrix unit to int32 sums."""

import dataclasses
import functools

from pallas_kernels.lanes.fragments import gather_bytes
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import BLOCK_BYTES, DenseRowsGeometry
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import LaneContext, in_ring, slot_offset
from pallas_kernels.matvec.mosaic_gpu.streaming import POSITION_MASKS


@dataclasses.dataclass(frozen=True)
class Operands:
    """Loads of the operands of a step."""

    isa: Instructions
    g: DenseRowsGeometry
    piece: Value
    """Address of the lane's plane row in the warp's piece, in the first plane of slot 0."""
    codes: list[Value]
    """For each pair of row tiles, the address of the lane's codes in plane 0 of the first chunk."""

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

        With ``warpgroups`` the address of the codes, ``[plane]``, takes their place.

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
                codes.append(self.codes[0] + first + f * g.unit_bytes)
                continue
            for t, address in zip(range(0, g.row_tiles, 2), self.codes, strict=True):
                count = 4 if t + 1 < g.row_tiles else 2
                codes += isa.load_shared(address + first + f * g.unit_bytes, count)
        return words + codes


def multiply(
    isa: Instructions, g: DenseRowsGeometry, accumulators: list[Value], step: int, operands: list[Value]
) -> list[Value]:
    """Multiplies a step of a section.

    Args:
      isa, g: The instructions and sizes.
      accumulators: int32 ``[row tile][position][4]``, flat.
      step: The step.
      operands: See ``Operands.load``.

    Returns:
      The new accumulators.
    """
    planes = len(g.steps[step][1])
    codes = operands[4 * planes :]
    if g.dense.warpgroups:
        return multiply_by_warpgroup(isa, g, accumulators, operands, codes)
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
    operands: list[Value],
    codes: list[Value],
) -> list[Value]:
    """Multiplies a step like ``multiply``; ``codes`` are the addresses of the codes of each plane.

    The digits of the next plane are masked while the matrix unit multiplies one.
    """
    positions = range(len(POSITION_MASKS))

    def fragments(n: int) -> list[Value]:
        """Returns the fragments of A of a plane, ``[position][4]``; nothing after the last plane."""
        if n == len(codes):
            return []
        a = gather_bytes(isa, operands[4 * n :][:4])
        return a + [word & mask for mask in POSITION_MASKS[1:] for word in a]

    sums = [[v for t in range(g.row_tiles) for v in accumulators[accumulator(t, p) :][:4]] for p in positions]
    a = fragments(0)
    for n, address in enumerate(codes):
        matrices = [a[4 * p :][:4] for p in positions]
        sums, a = isa.warpgroup_multiply_add(sums, matrices, address, functools.partial(fragments, n + 1))
    return [v for t in range(g.row_tiles) for p in positions for v in sums[p][4 * t : 4 * t + 4]]


def accumulator(row_tile: int, position: int) -> int:
    """Returns the index of the first of four accumulators of a row tile and digit position."""
    return 16 * row_tile + 4 * position
