"""Copies planes and activations of units into shared memory, some units ahead.

One thread starts the copies of a unit, which the tensor memory accelerator makes. The others wait until the
unit has arrived.
"""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import BARRIER_BYTES, PIECES, X_ROW_CHANNELS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import LaneContext, Refs

TILE_WORDS = PIECES * layout.PIECE // layout.WORD_DIGITS
"""Words of the row of a plane in a tile."""


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of the CTA's units, which thread 0 starts."""

    isa: Instructions
    g: Geometry
    refs: Refs
    context: LaneContext

    def start(self) -> None:
        """Makes the arrival barriers, and starts copying the first units into all slots but the last."""
        isa = self.isa
        with isa.when(self.context.thread.equals(0)):
            for slot in range(self.g.slots):
                isa.start_arrivals(self.context.shared + (self.g.barriers_base + slot * BARRIER_BYTES))
            for unit in range(self.g.slots - 1):
                self._copy(isa.constant(unit))
        isa.block_barrier()

    def advance(self, unit: Value) -> None:
        """Starts copying into the slot of the unit before this one, which all warps have multiplied."""
        self.isa.block_barrier()
        with self.isa.when(self.context.thread.equals(0)):
            self._copy(unit + (self.g.slots - 1))

    def wait(self, unit: Value) -> None:
        """Waits until a unit has arrived, if it exists."""
        with self.isa.when(unit < self.context.units):
            self.isa.wait_arrival(self._barrier(unit), (unit // self.g.slots) & 1)

    def slot(self, unit: Value) -> Value:
        """Returns the address of the slot of a unit of the CTA."""
        return self.context.shared + unit % self.g.slots * self.g.slot_bytes

    def _barrier(self, unit: Value) -> Value:
        place = unit % self.g.slots * BARRIER_BYTES
        return self.context.shared + (place + self.g.barriers_base)

    def _copy(self, unit: Value) -> None:
        """Starts copying a unit of the CTA, if it exists.

        The accelerator writes zeros in place of pieces and rows that the arrays do not have.
        """
        isa, g, context = self.isa, self.g, self.context
        with isa.when(unit < context.units):
            number = context.first_unit + unit
            tile, channel = context.tile(number // g.groups), number % g.groups * layout.GROUP
            slot, barrier, zero = self.slot(unit), self._barrier(unit), isa.constant(0)
            isa.expect_bytes(barrier, g.slot_bytes)
            box, corner = (g.level, layout.GROUP, TILE_WORDS), [zero, channel, tile * TILE_WORDS]
            once = g.row_batches == 1
            isa.copy_box(slot, self.refs.planes, corner, box, barrier, evict_first=once)
            row = context.batch * g.rows_per_cta
            for half in range(layout.GROUP // X_ROW_CHANNELS):
                corner = [row, channel + half * X_ROW_CHANNELS]
                target = slot + (g.x_base + half * g.x_half_bytes)
                isa.copy_box(target, self.refs.x, corner, (g.rows_per_cta, X_ROW_CHANNELS), barrier)
