"""Phases stream and multiply: from the listed rows through the ring of the warp to the matrix unit."""

import dataclasses

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES, STEP_BYTES, Geometry
from pallas_kernels.matvec.mosaic_gpu.lane_context import COPY_BYTES, LaneContext, Refs, weight_address
from pallas_kernels.matvec.mosaic_gpu.tile import stored_piece

COPY_LANES = ROW_BYTES // COPY_BYTES
"""Number of consecutive lanes that copy one row. Only whole 128-byte lines reach the full bandwidth."""

POSITION_MASKS = (0xFFFFFFFF, 0x0C0C0C0C, 0x30303030, 0xC0C0C0C0)
"""Mask of the digits at position ``p`` of the four bytes of a word; for ``p = 0`` the mask keeps all
digits."""


def in_first_slot(ring: Value, pair: Value, piece: Value) -> Value:
    """Returns the address, in slot 0 of the ring, of 16-byte piece ``piece`` of a pair's even row.

    A step has 4 pairs of plane rows. The odd row of a pair lies half a slot after the even row. Addresses are
    swizzled, so that neither copies nor loads have bank conflicts.
    """
    return ring + (pair << 7) + ((piece ^ (pair << 1)) << 4)


@dataclasses.dataclass(frozen=True)
class RingCopies:
    """Copies of the steps of a list into the warp's ring, up to ``slots - 1`` steps ahead."""

    isa: Instructions
    g: Geometry

    def copy(self, step: Value) -> None:
        """Starts copying one step into its slot."""
        raise NotImplementedError

    def start(self, steps: Value) -> Value:
        """Starts copying the first of ``steps`` steps, at most ``slots - 1``; returns their number.

        Each step is one copy group, here and in ``fill_ring`` and ``stream``.
        """
        ahead = self.g.slots - 1
        started = self.isa.select(steps < ahead, steps, self.isa.constant(ahead))

        def body(step: Value, carry: list[Value]) -> list[Value]:
            self.copy(step)
            self.isa.commit_copies()
            return carry

        self.isa.loop(started, [], body)
        return started

    def fill_ring(self, started: Value, steps: Value) -> None:
        """Starts copying further steps, until ``slots - 1`` copy groups are in flight.

        If there are fewer steps, the last groups are empty, so that ``stream`` can count groups.
        """

        def body(i: Value, carry: list[Value]) -> list[Value]:
            with self.isa.when(started + i < steps):
                self.copy(started + i)
            self.isa.commit_copies()
            return carry

        self.isa.loop(self.isa.constant(self.g.slots - 1) - started, [], body)


@dataclasses.dataclass(frozen=True)
class Copies(RingCopies):
    """Copies of listed rows into the warp's ring. Lanes ``8 i .. 8 i + 7`` copy rows ``2 i, 2 i + 1``."""

    target: Value
    """Shared-memory address that the lane copies 16 bytes of an even row to, in slot 0."""
    source: Value
    """Global address that the lane copies from, for a row at offset 0."""
    entries: Value
    """Shared-memory address of the list entries of the lane's two rows in step 0."""

    @classmethod
    def create(cls, isa: Instructions, g: Geometry, refs: Refs, context: LaneContext) -> "Copies":
        """Computes the addresses of the lane."""
        pair, piece = context.lane >> 3, context.lane & (COPY_LANES - 1)
        source_piece = stored_piece(isa, piece, context.pieces)
        return cls(
            isa,
            g,
            target=in_first_slot(context.ring, pair, piece),
            source=weight_address(isa, refs.planes, context, g.planes * g.plane_bytes)
            + isa.widen(source_piece << 4),
            entries=context.list + pair * (2 * g.entry_bytes),
        )

    def copy(self, step: Value) -> None:
        """Starts copying one step into its slot."""
        isa, g = self.isa, self.g
        entries = self.entries + step * g.step_entries_bytes
        slot = self.target + (step & (g.slots - 1)) * STEP_BYTES
        even, odd = [isa.load_shared(entries + i * g.entry_bytes)[0] for i in range(2)]
        isa.copy_async(slot, self.source + isa.widen(even), evict_first=True)
        isa.copy_async(slot + STEP_BYTES // 2, self.source + isa.widen(odd), evict_first=True)


def stream(isa: Instructions, g: Geometry, context: LaneContext, copies: Copies, steps: Value) -> list[Value]:
    """Multiplies the steps of the warp, and copies those steps that are not yet in flight.

    Returns:
      int32 accumulators ``[half][position][4]``, as a flat list.
    """
    slots = g.slots
    # Lane 4 row + column loads 16-byte piece `row` of the listed rows 2 column and 2 column + 1.
    row, column = context.lane >> 2, context.lane & 3
    first_slot = in_first_slot(context.ring, column, row)
    first_entries = context.list + column * (2 * g.entry_bytes)
    selector = code_selector(isa, row)

    def body(step: Value, accumulators: list[Value]) -> list[Value]:
        isa.wait_copies(slots - 2)
        isa.warp_barrier()  # Now the data of this step is visible, and the slot of the previous step is free.
        slot = first_slot + (step & (slots - 1)) * STEP_BYTES
        even, odd = isa.load_shared(slot, 4), isa.load_shared(slot + STEP_BYTES // 2, 4)
        _, even_code, _, odd_code = isa.load_shared(first_entries + step * g.step_entries_bytes, 4)
        b = [isa.permute_bytes(code, isa.constant(0), selector) for code in (even_code, odd_code)]
        ahead = step + (slots - 1)
        with isa.when(ahead < steps):
            copies.copy(ahead)
        isa.commit_copies()
        return multiply(isa, accumulators, even, odd, b)

    accumulators = isa.loop(steps, [isa.constant(0)] * 32, body)
    isa.wait_copies(0)
    isa.warp_barrier()  # Now the scales are visible, and the ring is free.
    return accumulators


def code_selector(isa: Instructions, column: Value) -> Value:
    """Returns the byte permutation that turns the code of a plane row into a register of B.

    At byte position ``b``, column ``2 b`` of B holds the high byte of the code and column ``2 b + 1`` the low
    byte. All other bytes are zero (selector 4).
    """
    shift = (column >> 1) << 2
    elsewhere = isa.constant(0x4444) ^ (isa.constant(4) << shift)
    return elsewhere | (((column & 1) ^ 1) << shift)


def multiply(
    isa: Instructions, accumulators: list[Value], even: list[Value], odd: list[Value], b: list[Value]
) -> list[Value]:
    """Multiplies one step and returns the new accumulators.

    Args:
      isa: The instructions.
      accumulators: See ``stream``.
      even, odd: 4 words of each of the lane's two listed rows.
      b: Fragment of B, one register for each of these rows.
    """
    out = list(accumulators)
    for half in range(2):
        for p, mask in enumerate(POSITION_MASKS):
            low, high = 2 * half, 2 * half + 1
            words = [even[low], even[high], odd[low], odd[high]]
            a = [word & mask for word in words] if p else words
            i = accumulator(half, p)
            out[i : i + 4] = isa.matrix_multiply_add(out[i : i + 4], a, b)
    return out


def accumulator(half: int, position: int) -> int:
    """Returns the index of the first of four accumulators of a half and a digit position."""
    return 16 * half + 4 * position
