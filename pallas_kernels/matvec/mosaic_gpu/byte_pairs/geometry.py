"""Static sizes of a launch that multiplies pairs of bytes, and the shared-memory map."""

import dataclasses

from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.matvec.mosaic_gpu.config import BytePairs
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES, TILE_OUTPUT_BYTES, Geometry

STEP_ROWS = 16
"""Number of plane rows that a warp multiplies in one step: K = 32 of the matrix instruction, divided by the 2
bytes of a pair."""

STEP_BYTES = STEP_ROWS * ROW_BYTES
"""Bytes that one step reads, and that one slot of the ring holds: 2 KiB."""

MAX_ROWS_PER_CTA = 4
"""Largest number of activation rows that share one read of the weights. Two rows take 64 registers of every
lane for accumulators."""

ROWS_PER_MATRIX = 2
"""Number of activation rows in one matrix instruction: 8 columns of B, four of them for each row."""

PIECE_PAIRS = 4
"""Number of pairs of 16-byte pieces of a plane row in a tile. A matrix instruction multiplies one pair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytePairGeometry(Geometry):
    """Sizes of a launch of ``byte_pairs.program``. Warps and CTAs have the channels of ``Geometry``."""

    @property
    def byte_pairs(self) -> BytePairs:
        """Tuning of the program."""
        assert self.config.byte_pairs is not None
        return self.config.byte_pairs

    @property
    def row_batches(self) -> int:
        return -(-self.rows // MAX_ROWS_PER_CTA)

    @property
    def row_pairs(self) -> int:
        """Number of matrix instructions that cover the activation rows of a CTA."""
        return -(-self.rows_per_cta // ROWS_PER_MATRIX)

    @property
    def slots(self) -> int:
        """Number of steps that the ring of a warp holds."""
        return self.byte_pairs.ring_slots

    # --- the list of a warp: an array of offsets, then an array of codes for each pair of activation rows --
    @property
    def entry_words(self) -> int:
        return 1 + self.row_pairs

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

    @property
    def ring_bytes(self) -> int:
        """Bytes of one warp's ring. At the end the ring holds the warp's outputs of all activation rows."""
        return max(self.slots * STEP_BYTES, self.rows_per_cta * TILE_OUTPUT_BYTES)
