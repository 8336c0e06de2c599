"""Phases stream and multiply: from the listed rows through the ring of the warp to the matrix unit."""

import dataclasses

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.geometry import PIECE_PAIRS, STEP_BYTES, BytePairGeometry
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES
from pallas_kernels.matvec.mosaic_gpu.lane_context import LaneContext, Refs
from pallas_kernels.matvec.mosaic_gpu.streaming import COPY_LANES, POSITION_MASKS, RingCopies
from pallas_kernels.matvec.mosaic_gpu.tile import stored_piece

COPIED_ROWS = 4
"""Number of consecutive listed rows of a step that a lane copies 16 bytes of."""

CODE_MASKS = (0x00FF00FF, 0xFF00FF00)
"""Mask of the even and of the odd bytes of a register of B."""


def in_first_slot(ring: Value, row: Value, piece: Value) -> Value:
    """Returns the address, in slot 0 of the ring, of a 16-byte piece of a row.

    Addresses are swizzled, so that neither copies nor loads have bank conflicts.
    """
    return ring + row * ROW_BYTES + ((piece ^ (row & 7)) << 4)


@dataclasses.dataclass(frozen=True)
class Copies(RingCopies):
    """Copies of listed rows into the warp's ring. Lanes ``8 i .. 8 i + 7`` copy entries ``4 i .. 4 i + 3``.

    Entry ``4 i + 2 m + o`` of a step is row ``8 m + 2 i + o`` of the slot. The transposing load gives lane
    ``4 row + column`` the rows ``8 m + 2 column + o``, so its codes are four consecutive entries.
    """

    targets: list[Value]
    """Shared-memory addresses that the lane copies 16 bytes of its first two rows to, in slot 0."""
    source: Value
    """Global address of the planes."""
    piece: Value
    """Offset of the lane's 16 bytes in a row."""
    entries: Value
    """Shared-memory address of the offsets of the lane's rows in step 0."""

    @classmethod
    def create(cls, isa: Instructions, g: BytePairGeometry, refs: Refs, context: LaneContext) -> "Copies":
        """Computes the addresses of the lane."""
        i, piece = context.lane >> 3, context.lane & (COPY_LANES - 1)
        source_piece = stored_piece(isa, piece, context.pieces)
        return cls(
            isa,
            g,
            targets=[in_first_slot(context.ring, (i << 1) + o, piece) for o in range(2)],
            source=isa.global_address(refs.planes),
            piece=source_piece << 4,
            entries=context.list + (i << 4),
        )

    def copy(self, step: Value) -> None:
        """Starts copying one step into its slot."""
        isa, g = self.isa, self.g
        slot = (step & (g.slots - 1)) * STEP_BYTES
        offsets = isa.load_shared(self.entries + step * g.step_entries_bytes, COPIED_ROWS)
        for i, offset in enumerate(offsets):
            m, o = divmod(i, 2)
            target = self.targets[o] + slot + 8 * ROW_BYTES * m
            # The sum is an offset in the planes, so it fits 32 bits.
            isa.copy_async(target, self.source + isa.widen(offset + self.piece), evict_first=True)


def stream(
    isa: Instructions, g: BytePairGeometry, context: LaneContext, copies: Copies, steps: Value
) -> list[Value]:
    """Multiplies the steps of the warp, and copies those steps that are not yet in flight.

    Returns:
      int32 accumulators ``[row pair][piece pair][position][4]``, as a flat list.
    """
    # Lane 8 matrix + row gives the address of that row of that matrix. Matrices 0 and 1 are the two pieces of
    # the slot's rows 0 to 7, matrices 2 and 3 those of its rows 8 to 15.
    matrix, row = context.lane >> 3, context.lane & 7
    loads = in_first_slot(context.ring, ((matrix >> 1) << 3) + row, matrix & 1)
    codes = context.list + g.code_stride + ((context.lane & 3) << 4)
    column = context.lane >> 2
    mask = isa.select((column & 2).equals(0), *[isa.constant(mask) for mask in CODE_MASKS])
    selector = code_selector(column)

    def body(step: Value, accumulators: list[Value]) -> list[Value]:
        isa.wait_copies(g.slots - 2)
        isa.warp_barrier()  # Now the data of this step is visible, and the slot of the previous step is free.
        slot = loads + (step & (g.slots - 1)) * STEP_BYTES
        words = [isa.load_matrices_transposed(slot ^ (32 * i)) for i in range(PIECE_PAIRS)]
        entries = codes + step * g.step_entries_bytes
        b = []
        for pair in range(g.row_pairs):
            first, second, third, fourth = isa.load_shared(entries + pair * g.code_stride, 4)
            b.append(
                [
                    isa.permute_bytes(low, high, selector) & mask
                    for low, high in ((first, second), (third, fourth))
                ]
            )
        ahead = step + (g.slots - 1)
        with isa.when(ahead < steps):
            copies.copy(ahead)
        isa.commit_copies()
        return multiply(isa, g, accumulators, words, b)

    accumulators = isa.loop(steps, [isa.constant(0)] * (16 * PIECE_PAIRS * g.row_pairs), body)
    isa.wait_copies(0)
    isa.warp_barrier()  # Now the scales are visible, and the ring is free.
    return accumulators


def code_selector(column: Value) -> Value:
    """Returns the byte permutation that takes a register of B for a column from the codes of two entries.

    Column ``4 row + 2 odd + low`` of B holds the high (0) or low (1) bytes of the codes of an activation row
    of the pair, for the even (0) or odd (1) bytes of A. A word of codes has the low and the high byte of the
    first row, then those of the second. Masks clear the bytes of the other parity.
    """
    byte = ((column >> 2) << 1) + ((column & 1) ^ 1)
    return byte * 0x1111 + 0x4400


def multiply(
    isa: Instructions,
    g: BytePairGeometry,
    accumulators: list[Value],
    words: list[list[Value]],
    b: list[list[Value]],
) -> list[Value]:
    """Multiplies one step and returns the new accumulators.

    Args:
      isa, g: The instructions and sizes.
      accumulators: See ``stream``.
      words: ``[piece pair][4]``: fragments of A.
      b: ``[row pair][2]``: fragments of B.
    """
    out = list(accumulators)
    for i, a in enumerate(words):
        for p, mask in enumerate(POSITION_MASKS):
            masked = [word & mask for word in a] if p else a
            for pair in range(g.row_pairs):
                first = accumulator(pair, i, p)
                out[first : first + 4] = isa.matrix_multiply_add(out[first : first + 4], masked, b[pair])
    return out


def accumulator(row_pair: int, piece_pair: int, position: int) -> int:
    """Returns the index of the first of four accumulators of a row pair, piece pair and digit position."""
    return 16 * (PIECE_PAIRS * row_pair + piece_pair) + 4 * position
