"""Phase copy: plane rows that some activation row reads, from global memory to the ring of the CTA."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import (
    BLOCK_BYTES,
    CHANNELS_PER_LANE,
    DenseRowsGeometry,
)
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import (
    LaneContext,
    first_channel,
    in_ring,
    pieces_of,
    place_of,
    slot_offset,
)
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES
from pallas_kernels.matvec.mosaic_gpu.lane_context import COPY_BYTES, Refs
from pallas_kernels.matvec.mosaic_gpu.streaming import COPY_LANES
from pallas_kernels.matvec.mosaic_gpu.tile import stored_piece


def ring_row(channel: Value) -> Value:
    """Returns the row of a block for a channel: ``16 j + 8 h + 2 c + o`` for channel ``8 c + 4 j + 2 h + o``.

    The transposing load gives lane ``4 row + c`` the rows ``2 c`` and ``2 c + 1`` of four matrices of 8 rows.
    In this order they are the channels ``8 c .. 8 c + 7``, whose codes are neighbours.
    """
    return ((channel & 4) << 2) | ((channel & 2) << 2) | ((channel >> 3) << 1) | (channel & 1)


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of steps into the ring. 8 lanes copy a plane row.

    A plane row that no activation row reads is not copied. Its place in the ring keeps any old bytes, which
    do not matter, because all codes of the plane row are 0.
    """

    isa: Instructions
    g: DenseRowsGeometry
    context: LaneContext
    items: Value
    """Number of items of the CTA."""
    piece: Value
    """The thread's piece of its plane rows."""
    channels: list[Value]
    """The thread's channels in a chunk."""
    targets: list[Value]
    """Shared-memory addresses of the thread's 16 bytes of each channel, in the first plane of slot 0."""
    source: Value
    """Global address of plane 0."""
    offset: Value
    """Offset in the plane of the first channel's row in chunk 0 of the CTA and its first tile."""

    @classmethod
    def create(cls, isa: Instructions, g: DenseRowsGeometry, refs: Refs, context: LaneContext) -> "Copies":
        """Computes the addresses of the thread."""
        channel, piece = context.thread // COPY_LANES, context.thread % COPY_LANES
        channels = [channel + first for first in range(0, LANES, g.threads // COPY_LANES)]
        ring = context.shared + g.ring_base
        first = first_channel(g, context) + channel
        return cls(
            isa,
            g,
            context,
            items=context.tiles * g.sections,
            piece=piece,
            channels=channels,
            targets=[in_ring(ring, ring_row(c), piece) for c in channels],
            source=isa.global_address(refs.planes),
            offset=first * g.stored_row_bytes + context.first_tile * ROW_BYTES,
        )

    def copy(self, item: Value, step: int, *, exists: Value | None = None) -> None:
        """Starts copying a step of an item, if it ``exists``, into its slot."""
        isa, g = self.isa, self.g
        slot = slot_offset(g, item, step)
        chunk_of_section, planes = g.steps[step]
        tile, section = place_of(isa, g, self.context, item)
        chunk = section * g.section_chunks + chunk_of_section
        group, words = chunk >> 2, (chunk & 3) * (LANES // CHANNELS_PER_LANE)
        marks = self.context.shared + g.masks_base + group * (g.planes * layout.GROUP) + (words << 2)
        piece = stored_piece(isa, self.piece, pieces_of(isa, g, self.context, tile))
        offset = self.offset + chunk * (LANES * g.stored_row_bytes) + tile * ROW_BYTES + piece * COPY_BYTES
        marked = [
            [isa.load_shared(marks + f * layout.GROUP + (channel & -CHANNELS_PER_LANE))[0] for f in planes]
            for channel in self.channels
        ]
        for i, (channel, target) in enumerate(zip(self.channels, self.targets, strict=True)):
            byte = isa.constant(0xFF) << ((channel & (CHANNELS_PER_LANE - 1)) << 3)
            distance = (LANES // len(self.channels)) * g.stored_row_bytes * i
            source = self.source + isa.widen(offset + distance)
            for n, f in enumerate(planes):
                where = ~(marked[i][n] & byte).equals(0)
                isa.copy_async(
                    target + slot + n * BLOCK_BYTES,
                    source + f * g.plane_bytes,
                    evict_first=True,
                    where=where if exists is None else where & exists,
                )

    def copy_ahead(self, item: Value, step: int) -> None:
        """Starts copying the step that comes ``slots`` steps after a step of an item, as one copy group."""
        items, step = divmod(step + self.g.slots, len(self.g.steps))
        ahead = item + items
        self.copy(ahead, step, exists=ahead < self.items if items else None)
        self.isa.commit_copies()

    def start(self, steps: range) -> None:
        """Starts copying some of the first steps, as one copy group each."""
        for step in steps:
            item, step_of_section = divmod(step, len(self.g.steps))
            first = self.isa.constant(item)
            self.copy(first, step_of_section, exists=first < self.items if item >= self.g.sections else None)
            self.isa.commit_copies()
