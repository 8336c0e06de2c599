"""Codes activations in the CTAs that multiply them, one unit ahead, if there are few rows."""

import dataclasses

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.coding import (
    code,
    load_words,
    low_offset,
    operand_offset,
)
from pallas_kernels.matmul.mosaic_gpu.geometry import WARPS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import LaneContext, Refs


@dataclasses.dataclass(frozen=True)
class Coder:
    """Codes of the units of a CTA. Each warp codes ``rows_per_cta / 8`` activation rows of every unit."""

    isa: Instructions
    g: Geometry
    refs: Refs
    context: LaneContext
    rows: list[Value]
    """Activation rows of the warp."""

    @classmethod
    def create(cls, isa: Instructions, g: Geometry, refs: Refs, context: LaneContext) -> "Coder":
        """Computes the rows of the warp."""
        warp = isa.thread_index() >> 5
        rows = [warp + first for first in range(0, g.rows_per_cta, WARPS)]
        return cls(isa, g, refs, context, rows)

    def base(self, unit: Value) -> Value:
        """Returns the offset in shared memory of the codes of a unit; the records follow them."""
        return (unit & 1) * self.g.coded_bytes + self.g.coded_base

    def load(self, unit: Value) -> list[Value]:
        """Loads the lane's activations of a unit of the CTA; of its last one, if the unit does not exist."""
        isa, g = self.isa, self.g
        unit = isa.select(unit < self.context.units, unit, self.context.units - 1)
        group = (self.context.first_unit + unit) % g.groups
        words = (load_words(isa, g, self.refs.x, self.context.lane, row, group) for row in self.rows)
        return [word for row_words in words for word in row_words]

    def store(self, unit: Value, words: list[Value]) -> None:
        """Stores the codes and records of a unit, whose activations are loaded."""
        isa, g = self.isa, self.g
        base = self.context.shared + self.base(unit)
        records = base + g.group_code_bytes
        first_lane = self.context.lane.equals(0)
        for i, row in enumerate(self.rows):
            codes = code(isa, words[2 * i :][:2], g.level)
            operands = base + operand_offset(g, self.context.lane, row)
            isa.store_shared(operands, [codes.high])
            isa.store_shared(operands + low_offset(g), [codes.low])
            isa.store_shared(records + (row << 4), codes.starts * 2, first_lane)
            isa.store_shared(records + (row << 4) + 16 * g.rows_per_cta, codes.factors, first_lane)
