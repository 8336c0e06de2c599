"""Copies planes, codes, scales and records into shared memory, a few steps ahead."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import (
    PIECE_BYTES,
    THREADS,
    Geometry,
)
from pallas_kernels.matmul.mosaic_gpu.lane_context import LaneContext, Refs, chunk, in_row, tile_pieces

COPY_BYTES = 16
"""Bytes of an asynchronous copy."""


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of steps, and with the first step of each group of its scales and records."""

    isa: Instructions
    g: Geometry
    refs: Refs
    context: LaneContext
    thread: Value

    def fill_ring(self) -> None:
        """Starts copying the first steps. Steps that do not exist are empty copy groups."""

        def body(step: Value, carry: list[Value]) -> list[Value]:
            self.copy(step)
            return carry

        self.isa.loop(self.isa.constant(self.g.slots - 1), [], body)

    def copy(self, step: Value) -> None:
        """Starts copying a step of the CTA, if it exists, and closes the copy group."""
        isa, g = self.isa, self.g
        with isa.when(step < self.context.units * g.group_steps):
            done, step_of_group = step // g.group_steps, step % g.group_steps
            unit = self.context.first_unit + done
            tile, group = unit // g.groups, unit % g.groups
            slot = self.context.shared + step % g.slots * g.slot_bytes
            self._copy_planes(slot, tile, group * layout.GROUP + step_of_group * g.step_channels)
            blob = self.context.batch * g.groups + group
            if not g.codes_activations:
                self._copy_codes(slot, blob * g.group_steps + step_of_group)
            with isa.when(step_of_group.equals(0)):
                slot = self.context.shared + done % g.group_slots * g.group_bytes + g.groups_base
                self._copy_scales(slot, tile, group)
                if not g.codes_activations:
                    self._copy_records(slot + g.scales_bytes, blob)
        isa.commit_copies()

    def _copy_planes(self, slot: Value, tile: Value, channel: Value) -> None:
        isa, g = self.isa, self.g
        rows_at_once = THREADS // g.pieces
        row, piece = self.thread // g.pieces, self.thread % g.pieces
        target = slot + in_row(g, row, piece)
        pieces = tile_pieces(isa, g, tile)
        if pieces is not None:
            piece = isa.select(piece < pieces, piece, isa.constant(0))
        offset = (channel + row) * g.stored_row_bytes + tile * g.row_bytes + piece * PIECE_BYTES
        source = isa.global_address(self.refs.planes) + isa.widen(offset)
        for plane in range(g.level):
            for first in range(0, g.step_channels, rows_at_once):
                isa.copy_async(
                    target + (plane * g.plane_step_bytes + first * g.row_bytes),
                    source + (plane * g.plane_bytes + first * g.stored_row_bytes),
                    evict_first=g.row_batches == 1,
                )

    def _copy_codes(self, slot: Value, step: Value) -> None:
        isa, g = self.isa, self.g
        count = g.step_matrices * g.matrix_code_bytes
        source = isa.global_address(self.refs.codes) + isa.widen(step * count)
        self._copy_consecutive(slot + g.level * g.plane_step_bytes, source, count)

    def _copy_records(self, slot: Value, blob: Value) -> None:
        isa, g = self.isa, self.g
        source = isa.global_address(self.refs.records) + isa.widen(blob * g.record_bytes)
        self._copy_consecutive(slot, source, g.record_bytes)

    def _copy_consecutive(self, target: Value, source: Value, count: int) -> None:
        """Copies ``count`` bytes."""
        offset = self.thread * COPY_BYTES
        target, source = target + offset, source + self.isa.widen(offset)
        for first in range(0, count, THREADS * COPY_BYTES):
            if first + THREADS * COPY_BYTES <= count:
                self.isa.copy_async(target + first, source + first)
            else:
                with self.isa.when(offset < count - first):
                    self.isa.copy_async(target + first, source + first)

    def _copy_scales(self, slot: Value, tile: Value, group: Value) -> None:
        """Copies the scales in the order ``[chunk of 4][piece][16]``."""
        isa, g = self.isa, self.g
        copies = g.scales_bytes // COPY_BYTES
        with isa.when(self.thread < copies):
            part, in_chunk = self.thread // (2 * g.pieces), self.thread % (2 * g.pieces)
            pieces = tile_pieces(isa, g, tile)
            if pieces is not None:
                in_chunk = isa.select(in_chunk < pieces * 2, in_chunk, isa.constant(0))
            first, chunk_outputs = chunk(isa, g, tile)
            output = group * g.stored_n + first + part * chunk_outputs + in_chunk * 8
            source = isa.global_address(self.refs.scales) + isa.widen(output << 1)
            isa.copy_async(slot + self.thread * COPY_BYTES, source)
