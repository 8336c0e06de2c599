"""Phases stream and multiply: listed rows through the warp's ring to the matrix unit."""

import dataclasses

from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES, STEP_BYTES, Geometry
from pallas_kernels.matvec.mosaic_gpu.place import COPY_BYTES, Place, Refs

COPY_LANES = ROW_BYTES // COPY_BYTES
"""Consecutive lanes that copy one row: whole 128-byte lines reach full bandwidth, pieces do not."""

POSITION_MASKS = (0xFFFFFFFF, 0x0C0C0C0C, 0x30303030, 0xC0C0C0C0)
"""What is multiplied for digit position ``p`` of a word's four bytes: these digits, for 0 all of them."""


def in_first_slot(ring: Value, pair: Value, piece: Value) -> Value:
    """Address of 16 bytes, number ``piece``, of a pair's even row in slot 0; the odd row is half a slot on.

    Swizzled, so that neither the lanes that copy nor those that multiply meet in a bank.
    """
    return ring + (pair << 7) + ((piece ^ (pair << 1)) << 4)


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copying steps of the list into the warp's ring: 8 lanes to a row, rows 2 i and 2 i + 1 of the list by
    lanes 8 i .. 8 i + 7."""

    isa: Instructions
    g: Geometry
    target: Value
    """Shared-memory address of the lane's 16 bytes of an even row in slot 0."""
    source: Value
    """Global address of the lane's 16 bytes of a row of offset 0."""
    entries: Value
    """Shared-memory address of the lane's pair of entries of step 0."""

    @classmethod
    def of(cls, isa: Instructions, g: Geometry, refs: Refs, place: Place) -> "Copies":
        """Those of the lane at ``place``."""
        row, piece = place.lane >> 3, place.lane & (COPY_LANES - 1)
        return cls(
            isa,
            g,
            target=in_first_slot(place.ring, row, piece),
            source=isa.global_address(refs.planes) + isa.widen(piece << 4),
            entries=place.list + row * (2 * g.entry_bytes),
        )

    def copy(self, step: Value) -> None:
        """Starts copying one step into its slot."""
        isa, g = self.isa, self.g
        entries = self.entries + step * g.step_entries_bytes
        slot = self.target + (step & (g.config.ring_slots - 1)) * STEP_BYTES
        even, odd = [isa.load_shared(entries + i * g.entry_bytes)[0] for i in range(2)]
        isa.copy_async(slot, self.source + isa.widen(even), once=True)
        isa.copy_async(slot + STEP_BYTES // 2, self.source + isa.widen(odd), once=True)

    def begin(self, steps: Value) -> Value:
        """Copies the first of the list's ``steps``, as many as the ring takes; how many they are.

        Each is a group of its own, as in ``go_on`` and in ``stream``.
        """
        ahead = self.g.config.ring_slots - 1
        begun = self.isa.select(steps < ahead, steps, self.isa.constant(ahead))

        def body(step: Value, carry: list[Value]) -> list[Value]:
            self.copy(step)
            self.isa.commit_copies()
            return carry

        self.isa.loop(begun, [], body)
        return begun

    def go_on(self, begun: Value, steps: Value) -> None:
        """Fills the ring with what the list has after the steps begun; empty groups for what it has not."""

        def body(i: Value, carry: list[Value]) -> list[Value]:
            with self.isa.when(begun + i < steps):
                self.copy(begun + i)
            self.isa.commit_copies()
            return carry

        self.isa.loop(self.isa.constant(self.g.config.ring_slots - 1) - begun, [], body)


def stream(isa: Instructions, g: Geometry, place: Place, copies: Copies, steps: Value) -> list[Value]:
    """Multiplies the warp's ``steps``, of which the first are on their way, and copies the others.

    Returns int32 accumulators ``[row][half][position][4]``, flat.
    """
    slots = g.config.ring_slots
    # Lane 4 row + column takes words of group `row` of the list rows 2 column, + 1.
    row, column = place.lane >> 2, place.lane & 3
    take_from = in_first_slot(place.ring, column, row)
    take_entries = place.list + column * (2 * g.entry_bytes)
    selectors = byte_selectors(isa, g, row)

    def body(step: Value, accumulators: list[Value]) -> list[Value]:
        isa.wait_copies(slots - 2)
        isa.warp_barrier()  # The step's data is visible, and the slot of the last step is free.
        slot = take_from + (step & (slots - 1)) * STEP_BYTES
        even, odd = isa.load_shared(slot, 4), isa.load_shared(slot + STEP_BYTES // 2, 4)
        entries = load_entry_pair(isa, g, take_entries + step * g.step_entries_bytes)
        ahead = step + (slots - 1)
        with isa.when(ahead < steps):
            copies.copy(ahead)
        isa.commit_copies()
        return multiply(isa, g, accumulators, even, odd, entries, selectors)

    zeros = [isa.constant(0)] * (32 * g.rows_per_cta)
    accumulators = isa.loop(steps, zeros, body)
    isa.wait_copies(0)
    isa.warp_barrier()  # The scales are visible, the ring is free.
    return accumulators


def load_entry_pair(isa: Instructions, g: Geometry, address: Value) -> tuple[list[Value], list[Value]]:
    """Two consecutive list entries."""
    if g.entry_words == 2:
        words = isa.load_shared(address, 4)
        return words[:2], words[2:]
    return isa.load_shared(address, 4), isa.load_shared(address + g.entry_bytes, 4)


def byte_selectors(isa: Instructions, g: Geometry, column: Value) -> list[Value]:
    """For even and odd activation rows: the byte permutation that makes B's register from a code.

    Column ``2 b`` of B wants, at byte position ``b``, the high byte of the code, column ``2 b + 1`` the low
    one; zeros (selector 4) elsewhere. The code lies in the low or the high half of the entry's word.
    """
    shift = (column >> 1) << 2
    high = (column & 1) ^ 1
    elsewhere = isa.constant(0x4444) ^ (isa.constant(4) << shift)
    selectors = [elsewhere | (high << shift)]
    if g.rows_per_cta > 1:
        selectors.append(elsewhere | ((high + 2) << shift))
    return selectors


def multiply(
    isa: Instructions,
    g: Geometry,
    accumulators: list[Value],
    even: list[Value],
    odd: list[Value],
    entries: tuple[list[Value], list[Value]],
    selectors: list[Value],
) -> list[Value]:
    """One step: ``even`` and ``odd`` are 4 packed words each of this lane's two list rows."""
    zero = isa.constant(0)
    b = []
    for r in range(g.rows_per_cta):
        codes = [entry[1 + r // 2] for entry in entries]
        b.append([isa.permute_bytes(code, zero, selectors[r % 2]) for code in codes])
    out = list(accumulators)
    for half in range(2):
        for p, mask in enumerate(POSITION_MASKS):
            low, high = 2 * half, 2 * half + 1
            words = [even[low], even[high], odd[low], odd[high]]
            a = [word & mask for word in words] if p else words
            for r in range(g.rows_per_cta):
                at = accumulator(r, half, p)
                out[at : at + 4] = isa.matrix_multiply_add(out[at : at + 4], a, b[r])
    return out


def accumulator(row: int, half: int, position: int) -> int:
    """Index of the first of the four accumulators of this row, word group and digit position."""
    return 32 * row + 16 * half + 4 * position
