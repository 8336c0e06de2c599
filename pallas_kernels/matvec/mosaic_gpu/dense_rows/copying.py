"""Phase copy: plane rows that some activation row reads, from global memory to the ring of the CTA."""

import dataclasses
from collections.abc import Sequence

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

EARLY_PLANES = 2
"""Number of planes that are copied in the first steps before the rows that are read are known."""


def ring_row(channel: Value) -> Value:
    """Returns the row of a block for a channel: ``16 j + 8 h + 2 c + o`` for channel ``8 c + 4 j + 2 h + o``.

    The transposing load gives lane ``4 row + c`` the rows ``2 c`` and ``2 c + 1`` of four matrices of 8 rows.
    In this order they are the channels ``8 c .. 8 c + 7``, whose codes are neighbours.
    """
    return ((channel & 4) << 2) | ((channel & 2) << 2) | ((channel >> 3) << 1) | (channel & 1)


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of steps into the ring. 8 lanes copy a plane row.

    A plane row that no activation row reads is not copied, except by ``start_early``. Its place in the ring
    keeps any old bytes, which do not matter, because all codes of the plane row are 0.
    """

    isa: Instructions
    g: DenseRowsGeometry
    context: LaneContext
    items: Value
    """Number of items of the CTA."""
    piece: Value
    """The thread's piece of its plane rows."""
    channel: Value
    """The thread's channel in a chunk."""
    target: Value
    """Shared-memory address of the thread's 16 bytes, in the first plane of slot 0."""
    source: Value
    """Global address of plane 0."""
    offset: Value
    """Offset in the plane of the channel's row in chunk 0 of the CTA and its first tile."""

    @classmethod
    def create(cls, isa: Instructions, g: DenseRowsGeometry, refs: Refs, context: LaneContext) -> "Copies":
        """Computes the addresses of the thread."""
        channel, piece = context.thread // COPY_LANES, context.thread % COPY_LANES
        assert g.threads == LANES * COPY_LANES
        first = first_channel(g, context) + channel
        return cls(
            isa,
            g,
            context,
            items=context.tiles * g.sections,
            piece=piece,
            channel=channel,
            target=in_ring(context.shared + g.ring_base, ring_row(channel), piece),
            source=isa.global_address(refs.planes),
            offset=first * g.stored_row_bytes + context.first_tile * ROW_BYTES,
        )

    def copy(
        self, item: Value, step: int, planes: Sequence[int], *, marked: bool, exists: Value | None = None
    ) -> None:
        """Starts copying plane rows of a step of an item into its slot.

        Args:
          item: Index of the item.
          step: Step of the section.
          planes: The planes to copy, of those of the step.
          marked: Whether to copy only marked plane rows, or all.
          exists: Whether the item exists; None if it does.
        """
        isa, g = self.isa, self.g
        slot = slot_offset(g, item, step)
        chunk_of_section, planes_of_step = g.steps[step]
        tile, section = place_of(isa, g, self.context, item)
        chunk = section * g.section_chunks + chunk_of_section
        group, first_word = chunk >> 2, (chunk & 3) * (LANES // CHANNELS_PER_LANE)
        marks = self.context.shared + g.masks_base + group * (g.planes * layout.GROUP) + (first_word << 2)
        piece = stored_piece(isa, self.piece, pieces_of(isa, g, self.context, tile))
        offset = self.offset + chunk * (LANES * g.stored_row_bytes) + tile * ROW_BYTES + piece * COPY_BYTES
        source = self.source + isa.widen(offset)
        conditions: list[Value | None] = [exists] * len(planes)
        if marked:
            byte = isa.constant(0xFF) << ((self.channel & (CHANNELS_PER_LANE - 1)) << 3)
            if exists is not None:
                byte = isa.select(exists, byte, isa.constant(0))
            first = marks + (self.channel & -CHANNELS_PER_LANE)
            words = [isa.load_shared(first + f * layout.GROUP)[0] for f in planes]
            conditions = [~(word & byte).equals(0) for word in words]
        for f, where in zip(planes, conditions, strict=True):
            target = self.target + slot + (f - planes_of_step.start) * BLOCK_BYTES
            isa.copy_async(target, source + f * g.plane_bytes, evict_first=True, where=where)

    def copy_ahead(self, item: Value, step: int) -> None:
        """Starts copying the step that comes ``slots`` steps after a step of an item, as one copy group."""
        items, step = divmod(step + self.g.slots, len(self.g.steps))
        ahead = item + items
        exists = ahead < self.items if items else None
        self.copy(ahead, step, self.g.steps[step][1], marked=True, exists=exists)
        self.isa.commit_copies()

    def start_early(self) -> None:
        """Starts copying what ``copied_early`` names, before anything is marked, to the first copy group."""
        isa, g = self.isa, self.g
        for item, step, early in ((*divmod(s, len(g.steps)), copied_early(g, s)) for s in range(g.slots)):
            if not early:
                continue
            exists = None
            if g.groups % g.cta_groups:  # The last CTAs of a tile have groups that do not exist.
                group = self.context.split * g.cta_groups + item // g.config.warps_per_group
                exists = group < g.groups
            self.copy(isa.constant(item), step, early, marked=False, exists=exists)

    def start(self, steps: range) -> None:
        """Starts copying the rest of some of the first steps, as one copy group each."""
        g = self.g
        for s in steps:
            item, step = divmod(s, len(g.steps))
            first = self.isa.constant(item)
            exists = first < self.items if item >= g.sections else None
            rest = [f for f in g.steps[step][1] if f not in copied_early(g, s)]
            self.copy(first, step, rest, marked=True, exists=exists)
            self.isa.commit_copies()


def copied_early(g: DenseRowsGeometry, step: int) -> list[int]:
    """Returns the planes of one of the first steps that are copied while the CTA codes its activations.

    Some row reads nearly every channel there, so few of the copies are in vain.
    """
    item, step = divmod(step, len(g.steps))
    return [f for f in g.steps[step][1] if f < EARLY_PLANES] if item < g.sections else []
