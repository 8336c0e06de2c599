"""Coded activations: what a product with ``DenseRows.coded`` copies instead of computing it."""

import dataclasses

import jax
from jaxtyping import Array, Int32

from pallas_kernels.grading import GradingStats
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import BARRIER_BYTES, WARPS, DenseRowsGeometry
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import LaneContext
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedActivations:
    """Activations as codes for one product.

    They follow from the activations, their thresholds, and the sizes and level gains of the weight. A row of
    them follows from this row alone, but for the masks, which join the rows. So a kernel that computes
    activations could code them, too.

    Attributes:
      words: For each split of the input channels, the first ``records_end`` bytes of the shared memory of its
        CTAs (``DenseRowsGeometry``): codes, masks and records.
      stats: Statistics of the rows.
    """

    words: Int32[Array, "splits words"]
    stats: GradingStats


@dataclasses.dataclass(frozen=True)
class CodedOperands:
    """Copies of coded activations to the shared memory of the CTA."""

    isa: Instructions
    g: DenseRowsGeometry
    refs: Refs
    context: LaneContext

    def source(self) -> Value:
        """Returns the global address of the CTA's coded activations."""
        offset = self.isa.widen(self.context.split * self.g.records_end)
        return self.isa.global_address(self.refs.coded) + offset

    def start_first(self) -> None:
        """Starts copying masks and records, and the codes of the first group."""
        isa, g = self.isa, self.g
        with isa.when(self.context.thread.equals((WARPS - 1) * LANES)):
            count = g.records_end - g.masks_base
            self.copy(isa.constant(g.cta_groups), isa.constant(g.masks_base), count)
        self.copy_codes(self.context.warp.equals(0))

    def start_others(self) -> None:
        """Starts copying the codes of the other groups. Then a barrier of the CTA must follow."""
        if self.g.cta_groups > 1:
            self.copy_codes((self.context.warp >= 1) & (self.context.warp < self.g.cta_groups))

    def copy_codes(self, where: Value) -> None:
        """Starts copying the codes of the group with the index of the warp if ``where`` holds."""
        count = self.g.cta_chunks // self.g.cta_groups * self.g.chunk_bytes
        with self.isa.when(self.context.lane.equals(0) & where):
            self.copy(self.context.warp, self.context.warp * count, count)

    def copy(self, barrier: Value, offset: Value, count: int) -> None:
        """Starts copying the bytes at an offset, which arrive on a barrier."""
        isa, address = self.isa, self.barrier(barrier)
        isa.start_arrivals(address)
        isa.expect_bytes(address, count)
        isa.copy_bytes(self.context.shared + offset, self.source() + isa.widen(offset), count, address)

    def barrier(self, index: Value) -> Value:
        """Returns the address of an arrival barrier."""
        return self.context.shared + self.g.barriers_base + index * BARRIER_BYTES

    def wait_masks(self) -> None:
        """Waits for masks and records."""
        self.isa.wait_arrival(self.barrier(self.isa.constant(self.g.cta_groups)), self.isa.constant(0))

    def wait_codes(self, section: Value) -> None:
        """Waits for the codes of a section."""
        group = section // self.g.config.warps_per_group
        self.isa.wait_arrival(self.barrier(group), self.isa.constant(0))
