"""Static sizes of a launch that multiplies pairs of bytes, and the shared-memory map."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES, TILE_OUTPUT_BYTES, BytePairs, Geometry

STEP_ROWS = 16
"""Number of plane rows that a warp multiplies in one step: K = 32 of the matrix instruction, divided by the 2
bytes of a pair."""

ROWS_PER_MATRIX = 2
"""Number of activation rows in one matrix instruction: 8 columns of B, four of them for each row."""

PIECE_PAIRS = 4
"""Number of pairs of 16-byte pieces of a plane row in a tile. A matrix instruction multiplies one pair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytePairGeometry(Geometry):
    """Sizes of a launch of ``byte_pairs.program``.

    A *section* is the channels of one warp in the program for one row. Here one or two warps have a section.
    """

    @property
    def byte_pairs(self) -> BytePairs:
        """Tuning of the program."""
        assert self.config.byte_pairs is not None
        return self.config.byte_pairs

    @property
    def warps_per_section(self) -> int:
        return self.byte_pairs.warps_per_section

    @property
    def sections(self) -> int:
        """Number of sections of a CTA: 4 or 8."""
        return self.config.warps

    @property
    def warps(self) -> int:
        return self.sections * self.warps_per_section

    @property
    def outputs_per_thread(self) -> int:
        """Number of consecutive outputs that one thread sums over the sections: 4 or 2.

        With two warps for a section, each half of the threads sums other activation rows.
        """
        return layout.TILE // (self.sections * LANES)

    # --- activation rows ------------------------------------------------------------------------------
    @property
    def rows_per_cta(self) -> int:
        rows = super().rows_per_cta
        return 4 if rows == 3 and self.warps_per_section == 2 else rows

    @property
    def coded_rows(self) -> int:
        """Number of activation rows whose codes one warp computes: two warps divide four rows.

        Both compute the codes of one or two rows, because waiting for each other takes longer.
        """
        return self.rows_per_cta // 2 if self.shares_codes else self.rows_per_cta

    @property
    def shares_codes(self) -> bool:
        """Whether the two warps of a section read codes from each other's list."""
        return self.warps_per_section == 2 and self.rows_per_cta == 4

    @property
    def row_pairs(self) -> int:
        """Number of matrix instructions that cover the activation rows of a CTA."""
        return -(-self.rows_per_cta // ROWS_PER_MATRIX)

    # --- outputs --------------------------------------------------------------------------------------
    @property
    def piece_pairs(self) -> int:
        """Number of pairs of 16-byte pieces of a plane row that a warp multiplies: 4 or 2."""
        return PIECE_PAIRS // self.warps_per_section

    @property
    def row_part_bytes(self) -> int:
        """Bytes of a plane row that a warp copies and multiplies: 128 or 64."""
        return ROW_BYTES // self.warps_per_section

    @property
    def output_bytes(self) -> int:
        """Bytes of the outputs of a warp for one activation row."""
        return TILE_OUTPUT_BYTES // self.warps_per_section

    # --- the list of a warp: an array of offsets, then an array of codes for each pair of coded rows -------
    @property
    def entry_words(self) -> int:
        return 1 + -(-self.coded_rows // 2)

    @property
    def entry_bytes(self) -> int:
        """Bytes between the offsets of two entries."""
        return 4

    @property
    def step_entries_bytes(self) -> int:
        return STEP_ROWS * self.entry_bytes

    @property
    def code_stride(self) -> int:
        """Bytes of one array: all channels of the warp in every plane, a multiple of a step."""
        return self.planes * LANES * self.channels_per_lane * 4

    @property
    def list_bytes(self) -> int:
        return self.entry_words * self.code_stride

    # --- the ring of a warp ---------------------------------------------------------------------------
    @property
    def slots(self) -> int:
        """Number of steps that the ring holds."""
        return self.byte_pairs.ring_slots

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of the ring, which holds one step."""
        return STEP_ROWS * self.row_part_bytes

    @property
    def ring_bytes(self) -> int:
        """Bytes of one warp's ring. At the end the ring holds the warp's outputs of all activation rows."""
        return max(self.slots * self.slot_bytes, self.rows_per_cta * self.output_bytes)
