"""Copies planes, activations and scales of units into shared memory, a few units ahead."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import (
    COPY_BYTES,
    COPY_CHANNELS,
    PIECE_BYTES,
    PIECES,
    SCALES_BYTES,
    THREADS,
    TILE_ROW_BYTES,
    Geometry,
)
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    LaneContext,
    Refs,
    chunk,
    in_row,
    tile_pieces,
)

ROW_COPIES = layout.GROUP // COPY_CHANNELS
"""Number of copies of an activation row in a unit."""


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of the CTA's units."""

    isa: Instructions
    g: Geometry
    refs: Refs
    context: LaneContext
    thread: Value

    def fill_ring(self) -> None:
        """Starts copying the first units."""

        def body(unit: Value, carry: list[Value]) -> list[Value]:
            self.copy(unit)
            return carry

        self.isa.loop(self.isa.constant(self.g.ahead), [], body)

    def enter(self, unit: Value) -> None:
        """Waits for a unit of the CTA, and starts copying the one that is ``ahead`` units later.

        That one gets the slot of the unit before the last, which all warps have multiplied.
        """
        self.isa.wait_copies(self.g.ahead - 1)
        self.isa.publish_operands()
        self.isa.block_barrier()
        self.copy(unit + self.g.ahead)

    def slot(self, unit: Value) -> Value:
        """Returns the address of the slot of a unit of the CTA."""
        return self.context.shared + unit % self.g.slots * self.g.slot_bytes

    def copy(self, unit: Value) -> None:
        """Starts copying a unit of the CTA, if it exists, and closes the copy group."""
        with self.isa.when(unit < self.context.units):
            number = self.context.first_unit + unit
            tile, group = number // self.g.groups, number % self.g.groups
            slot, channel = self.slot(unit), group * layout.GROUP
            self._copy_planes(slot, tile, channel)
            self._copy_activations(slot + self.g.x_base, channel)
            self._copy_scales(slot + self.g.scales_base, tile, group)
        self.isa.commit_copies()

    def _copy_planes(self, slot: Value, tile: Value, channel: Value) -> None:
        isa, g = self.isa, self.g
        rows_at_once = THREADS // PIECES
        row, piece = self.thread // PIECES, self.thread % PIECES
        target = slot + in_row(row, piece)
        pieces = tile_pieces(isa, g, tile)
        if pieces is not None:
            piece = isa.select(piece < pieces, piece, isa.constant(0))
        offset = (channel + row) * g.stored_row_bytes
        offset = offset + (tile * PIECES + piece) * PIECE_BYTES
        source = isa.global_address(self.refs.planes) + isa.widen(offset)
        for plane in range(g.level):
            for first in range(0, layout.GROUP, rows_at_once):
                isa.copy_async(
                    target + (plane * g.plane_unit_bytes + first * TILE_ROW_BYTES),
                    source + (plane * g.plane_bytes + first * g.stored_row_bytes),
                    evict_first=g.row_batches == 1,
                )

    def _copy_activations(self, target: Value, channel: Value) -> None:
        """Copies 8 channels at once to where ``warpgroup_multiply_add_bfloat16`` expects them.

        Rows that do not exist are copies of the last one, which nothing stores.
        """
        isa, g = self.isa, self.g
        for first in range(0, g.rows_per_cta * ROW_COPIES, THREADS):
            in_cta, part = (self.thread + first) // ROW_COPIES, self.thread % ROW_COPIES
            row = self.context.batch * g.rows_per_cta + in_cta
            if g.row_batches * g.rows_per_cta > g.rows:
                row = isa.select(row < g.rows, row, isa.constant(g.rows - 1))
            source = isa.widen(row * g.stored_k + channel + part * COPY_CHANNELS) << 1
            source = isa.global_address(self.refs.x) + source
            place = target + part * g.x_distance + (in_cta << 4)
            if first + THREADS <= g.rows_per_cta * ROW_COPIES:
                isa.copy_async(place, source)
            else:
                isa.copy_async(place, source, where=in_cta < g.rows_per_cta)

    def _copy_scales(self, target: Value, tile: Value, group: Value) -> None:
        """Copies the scales in the order ``[chunk of 4][piece][16]``."""
        isa, g = self.isa, self.g
        with isa.when(self.thread < SCALES_BYTES // COPY_BYTES):
            part, in_chunk = self.thread // (2 * PIECES), self.thread % (2 * PIECES)
            pieces = tile_pieces(isa, g, tile)
            if pieces is not None:
                in_chunk = isa.select(in_chunk < pieces * 2, in_chunk, isa.constant(0))
            first, chunk_outputs = chunk(isa, g, tile)
            output = group * g.stored_n + first + part * chunk_outputs + in_chunk * 8
            source = isa.global_address(self.refs.scales) + isa.widen(output << 1)
            isa.copy_async(target + self.thread * COPY_BYTES, source)
