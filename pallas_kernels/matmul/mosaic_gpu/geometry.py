"""Static sizes of a launch of the product at one level, and its shared memory."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES

MATRIX_ROWS = 8
"""Number of activation rows in one matrix instruction."""

MAX_ROWS_PER_CTA = 64
"""Largest number of activation rows that share one read of the planes."""

WORD_WARPS = 4
"""Number of warps that divide the words of a tile: each has 8 words, and each of its lanes one of them."""

STEP_CHANNELS = 32
"""Number of input channels of a step: two matrix instructions of K = 16."""

GROUP_STEPS = layout.GROUP // STEP_CHANNELS
"""Number of steps in a group."""

PLANE_STEP_BYTES = STEP_CHANNELS * layout.TILE_WORDS * 4
"""Bytes of one plane in one step: 4 KiB."""

SLOTS = 4
"""Number of steps that the ring of a CTA holds. All but one are in flight."""

CODE_PLANES = 3
"""Largest number of planes whose digits one bfloat16 holds exactly (see ``program``)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a launch.

    A CTA computes one tile of outputs over ``groups_per_cta`` groups of input channels, for up to
    ``rows_per_cta`` activation rows. The grid runs over row batches (fastest, because they share the L2),
    tiles and splits of the input channels. Each split writes a separate partial sum.

    Attributes:
      stored_k: Number of input channels, padded to whole groups.
      stored_n: Number of outputs, padded to whole pieces.
      level: Number of planes that are read, 1 to 4.
      rows: Number of activation rows.
      multiprocessors: Number of multiprocessors of the device. The number of splits follows from it.
    """

    stored_k: int
    stored_n: int
    level: int
    rows: int
    multiprocessors: int

    # --- activation rows ------------------------------------------------------------------------------
    @property
    def row_batches(self) -> int:
        """Number of batches of activation rows. The rows of a batch share one read of the planes."""
        return -(-self.rows // MAX_ROWS_PER_CTA)

    @property
    def row_tiles(self) -> int:
        """Number of matrix instructions that cover the rows of a batch, 1 to 8."""
        return -(-self.rows // (self.row_batches * MATRIX_ROWS))

    @property
    def rows_per_cta(self) -> int:
        """Number of rows of a batch, padded to whole matrix instructions."""
        return self.row_tiles * MATRIX_ROWS

    @property
    def padded_rows(self) -> int:
        """Number of activation rows with padding."""
        return self.row_batches * self.rows_per_cta

    @property
    def terms(self) -> int:
        """Number of matrices that add up to the weight: 2 at level 4, else 1 (see ``program``)."""
        return -(-self.level // CODE_PLANES)

    # --- outputs --------------------------------------------------------------------------------------
    @property
    def tiles(self) -> int:
        """Number of tiles of outputs."""
        return -(-self.stored_n // layout.TILE)

    @property
    def last_tile_pieces(self) -> int:
        """Number of pieces in the last tile, 1 to 8. All other tiles have 8."""
        return layout.last_tile_pieces(self.stored_n)

    @property
    def position_parts(self) -> int:
        """Number of warps, 1, 2 or 4, that divide the digit positions of the same words.

        With many activation rows, a warp has fewer outputs, so that a lane never has more than 64 sums.
        """
        return 1 if self.row_tiles <= 2 else 2 if self.row_tiles <= 4 else 4

    @property
    def positions(self) -> int:
        """Number of digit positions of a warp."""
        return 4 // self.position_parts

    @property
    def threads(self) -> int:
        """Number of threads in a CTA."""
        return WORD_WARPS * self.position_parts * LANES

    # --- input channels -------------------------------------------------------------------------------
    @property
    def groups(self) -> int:
        """Number of groups of input channels."""
        return self.stored_k // layout.GROUP

    @property
    def groups_per_cta(self) -> int:
        """Number of groups of input channels that a CTA sums over; the last split may have fewer.

        One CTA of 8 or 16 warps, or two of 4 warps, run on each multiprocessor.
        """
        resident_ctas = 2 if self.position_parts == 1 else 1
        return -(-self.groups // max(1, resident_ctas * self.multiprocessors // self.tiles))

    @property
    def splits(self) -> int:
        """Number of splits of the input channels, and of partial sums of each output."""
        return -(-self.groups // self.groups_per_cta)

    @property
    def blocks(self) -> int:
        """Number of CTAs."""
        return self.row_batches * self.tiles * self.splits

    # --- planes in memory -----------------------------------------------------------------------------
    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one plane row over all tiles."""
        return self.stored_n // layout.WORD_DIGITS * 4

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane."""
        return self.stored_k * self.stored_row_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of the ring, which holds one step."""
        return self.level * PLANE_STEP_BYTES

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a CTA."""
        return SLOTS * self.slot_bytes
