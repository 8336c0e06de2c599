"""Copies the planes from global memory into a ring in shared memory, a few steps ahead."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import PLANE_STEP_BYTES, SLOTS, STEP_CHANNELS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import PIECES, ROW_BYTES, LaneContext, Refs

COPY_BYTES = 16
"""Bytes of an asynchronous copy."""


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of steps into the ring, 16 bytes by each thread.

    In the ring, piece ``i`` of channel ``k`` of a step is at place ``i ^ 2 (k // 8)`` of the channel's 128
    bytes. Then the 32 lanes of a warp load their words without bank conflicts.
    """

    isa: Instructions
    g: Geometry
    source: Value
    """Global address of the tile in the first channel of the CTA, in plane 0."""
    shared: Value
    last_piece: Value | None
    """Index of the last piece of the tile; None if all tiles have all pieces."""

    @classmethod
    def create(cls, isa: Instructions, g: Geometry, refs: Refs, context: LaneContext) -> "Copies":
        first = context.first_group * layout.GROUP
        offset = isa.widen(first * g.stored_row_bytes + context.tile * ROW_BYTES)
        last_piece = None
        if g.last_tile_pieces < PIECES:
            whole, last = isa.constant(PIECES - 1), isa.constant(g.last_tile_pieces - 1)
            last_piece = isa.select(context.tile < g.tiles - 1, whole, last)
        source = isa.global_address(refs.planes) + offset
        return cls(isa, g, source, isa.shared_address(refs.shared), last_piece)

    def copy(self, step: Value) -> None:
        """Starts copying one step into its slot. A piece that the tile lacks is a copy of its piece 0."""
        isa, g = self.isa, self.g
        slot = self.shared + (step & (SLOTS - 1)) * g.slot_bytes
        copies = g.slot_bytes // COPY_BYTES
        for first in range(0, copies, g.threads):
            index = isa.thread_index() + first
            piece, channel, plane = index & (PIECES - 1), (index >> 3) & (STEP_CHANNELS - 1), index >> 8
            target = slot + plane * PLANE_STEP_BYTES + channel * ROW_BYTES
            target = target + ((piece ^ ((channel >> 3) << 1)) << 4)
            if self.last_piece is not None:
                piece = isa.select(self.last_piece < piece, isa.constant(0), piece)
            rows = (step * STEP_CHANNELS + channel) * g.stored_row_bytes
            source = self.source + isa.widen(plane * g.plane_bytes + rows + (piece << 4))
            if first + g.threads <= copies:
                isa.copy_async(target, source, evict_first=True)
            else:
                with isa.when(index < copies):
                    isa.copy_async(target, source, evict_first=True)
