"""Phases stream and multiply: from the listed rows through the ring of the CTA to the matrix unit."""

import dataclasses

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES
from pallas_kernels.matvec.mosaic_gpu.lane_context import COPY_BYTES, Refs
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import MATRIX_ENTRIES, SharedListGeometry
from pallas_kernels.matvec.mosaic_gpu.shared_list.lane_context import LaneContext
from pallas_kernels.matvec.mosaic_gpu.streaming import COPY_LANES, POSITION_MASKS
from pallas_kernels.matvec.mosaic_gpu.tile import stored_piece

EVEN_BYTES, ODD_BYTES = 0x6420, 0x7531
"""Selectors that gather the bytes of equal parity of two words."""


def ring_row(entry: Value) -> Value:
    """Returns the row of the ring for an entry: ``16 j + 8 h + 2 c + o`` for entry ``8 c + 4 j + 2 h + o``.

    The transposing load gives lane ``4 row + c`` the rows ``2 c`` and ``2 c + 1`` of four matrices of 8 rows.
    In this order they are the entries ``8 c .. 8 c + 7``, whose codes are neighbours.
    """
    return ((entry & 4) << 2) | ((entry & 2) << 2) | ((entry >> 3) << 1) | (entry & 1)


def in_ring(ring: Value, row: Value, piece: Value) -> Value:
    """Returns the address of a 16-byte piece of a row, swizzled to avoid bank conflicts on both sides."""
    return ring + row * ROW_BYTES + ((piece ^ (row & 7)) << 4)


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of listed rows into the ring. 8 lanes copy a row, all threads of the CTA 16 or 32 rows."""

    isa: Instructions
    g: SharedListGeometry
    targets: list[Value]
    """Shared-memory addresses of the thread's 16 bytes of each of its rows among the first 32 of slot 0."""
    source: Value
    """Global address of the thread's 16 bytes of the row at offset 0."""
    entries: Value
    """Shared-memory address of the thread's first entry in step 0."""

    @classmethod
    def create(cls, isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext) -> "Copies":
        """Computes the addresses of the thread."""
        entry, piece = context.thread // COPY_LANES, context.thread % COPY_LANES
        source_piece = stored_piece(isa, piece, context.pieces)
        return cls(
            isa,
            g,
            targets=[
                in_ring(context.shared + g.ring_base, ring_row(entry + first), piece)
                for first in range(0, MATRIX_ENTRIES, g.threads // COPY_LANES)
            ],
            source=isa.global_address(refs.planes) + isa.widen(source_piece * COPY_BYTES),
            entries=context.shared + (entry << 2),
        )

    def copy(self, step: Value) -> None:
        """Starts copying one step into its slot."""
        isa, g = self.isa, self.g
        slot = (step & (g.slots - 1)) * g.slot_bytes
        entries = self.entries + step * (4 * g.step_entries)
        rows_at_once = MATRIX_ENTRIES // len(self.targets)
        firsts = range(0, g.step_entries, rows_at_once)
        offsets = [isa.load_shared(entries + 4 * first)[0] for first in firsts]
        for i, offset in enumerate(offsets):
            matrix, round_of_matrix = divmod(i, len(self.targets))
            target = self.targets[round_of_matrix] + slot + matrix * (MATRIX_ENTRIES * ROW_BYTES)
            isa.copy_async(target, self.source + isa.widen(offset), evict_first=True)

    def fill_ring(self, steps: Value) -> None:
        """Starts copying the first steps. Steps that do not exist are empty copy groups."""

        def body(step: Value, carry: list[Value]) -> list[Value]:
            with self.isa.when(step < steps):
                self.copy(step)
            self.isa.commit_copies()
            return carry

        self.isa.loop(self.isa.constant(self.g.slots - 1), [], body)


def stream(
    isa: Instructions,
    g: SharedListGeometry,
    context: LaneContext,
    copies: Copies,
    first: Value,
    section_steps: Value,
    steps: Value,
) -> list[Value]:
    """Multiplies the steps of a section, and copies later ones.

    Args:
      isa, g, context, copies: The instructions, sizes, indices and copies.
      first: The section's first step in the list.
      section_steps: Number of its steps.
      steps: Number of all steps.

    Returns:
      int32 accumulators ``[piece][row tile][position][4]``, flat.
    """
    ring = context.shared + g.ring_base
    # Lane 8 matrix + row gives the address of that row of that matrix; each warp loads its own pieces.
    loads = [in_ring(ring, context.lane, context.warp * g.pieces + i) for i in range(g.pieces)]
    codes = code_addresses(isa, g, context)

    def body(i: Value, accumulators: list[Value]) -> list[Value]:
        step = first + i
        isa.wait_copies(g.slots - 2)
        isa.block_barrier()  # Now this step is visible, and the slot of the previous one is free.
        slot = (step & (g.slots - 1)) * g.slot_bytes
        words, b = [], []
        for m in range(g.step_matrices):
            matrix = slot + m * (MATRIX_ENTRIES * ROW_BYTES)
            words.append([isa.load_matrices_transposed(piece + matrix) for piece in loads])
            offset = i * g.step_entries + m * MATRIX_ENTRIES
            b.append([isa.load_shared(address + offset, 2) for address in codes])
        ahead = step + (g.slots - 1)
        with isa.when(ahead < steps):
            copies.copy(ahead)
        isa.commit_copies()
        for m in range(g.step_matrices):
            accumulators = multiply(isa, g, accumulators, words[m], b[m])
        return accumulators

    return isa.loop(section_steps, [isa.constant(0)] * (16 * g.row_tiles * g.pieces), body)


def code_addresses(isa: Instructions, g: SharedListGeometry, context: LaneContext) -> list[Value]:
    """Returns, for each row tile, the address of the lane's 8 bytes of codes of the first 32 entries.

    Column ``n`` of B holds the high (even n) or low bytes of activation row ``n // 2`` of the row tile.
    """
    lane_row, column = context.lane >> 2, context.lane & 3
    base = context.shared + g.codes_base + column * 8
    addresses = []
    for t in range(g.row_tiles):
        n = lane_row + 8 * t
        if (
            8 * (t + 1) > 2 * g.rows
        ):  # Columns without a row multiply another one, and the result is not used.
            n = isa.select(n < 2 * g.rows, n, lane_row & 1)
        addresses.append(base + n * g.codes_stride)
    return addresses


def multiply(
    isa: Instructions,
    g: SharedListGeometry,
    accumulators: list[Value],
    words: list[list[Value]],
    b: list[list[Value]],
) -> list[Value]:
    """Multiplies 32 entries with all activation rows and returns the new accumulators.

    Args:
      isa, g: The instructions and sizes.
      accumulators: See ``stream``.
      words: ``[piece][4]``: two bytes of each of the lane's 8 entries, two entries in a word.
      b: ``[row tile][2]``: the codes of these entries.
    """
    out = list(accumulators)
    for piece, (first, second, third, fourth) in enumerate(words):
        a = [
            isa.permute_bytes(low, high, selector)
            for low, high in ((first, second), (third, fourth))
            for selector in (EVEN_BYTES, ODD_BYTES)
        ]
        for p, mask in enumerate(POSITION_MASKS):
            masked = [word & mask for word in a] if p else a
            for t in range(g.row_tiles):
                i = accumulator(g, piece, t, p)
                out[i : i + 4] = isa.matrix_multiply_add(out[i : i + 4], masked, b[t])
    return out


def accumulator(g: SharedListGeometry, piece: int, row_tile: int, position: int) -> int:
    """Returns the index of the first of four accumulators of a piece, row tile and digit position."""
    return 16 * (piece * g.row_tiles + row_tile) + 4 * position
