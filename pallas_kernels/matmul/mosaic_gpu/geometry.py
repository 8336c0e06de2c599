"""Static sizes of a launch of the product at one level, and its shared memory."""

import dataclasses
import functools

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES

WARPS = 8
"""Number of warps in a CTA, two warpgroups. Two on each scheduler leave a lane all 255 registers."""

THREADS = WARPS * LANES
"""Number of threads in a CTA."""

PIECES = 4
"""Number of pieces of a tile, one for each warp of a warpgroup. A tile has 256 outputs, half a stored one."""

BLOCK_CHANNELS = 32
"""Number of input channels that a transposing load takes from each plane."""

BLOCKS = layout.GROUP // BLOCK_CHANNELS
"""Number of blocks of channels in a group."""

PRODUCTS = 2
"""Number of matrix instructions that cover the channels of a block."""

OCTET = 8
"""Number of activation rows, columns of B, that share the first registers of C."""

MAX_OCTETS = 8
"""Largest number of octets of a CTA. Sums and totals then take 128 registers of a lane."""

PIECE_BYTES = layout.PIECE // 4
"""Bytes of a piece in a row of a plane."""

TILE_ROW_BYTES = PIECES * PIECE_BYTES
"""Bytes of the row of a plane in a tile."""

SCALES_BYTES = 2 * PIECES * layout.PIECE
"""Bytes of the scales of a group in a tile."""

ACTIVATION_BYTES = 2
"""Bytes of a bfloat16 activation."""

COPY_BYTES = 16
"""Bytes of an asynchronous copy."""

COPY_CHANNELS = COPY_BYTES // ACTIVATION_BYTES
"""Number of activations in a copy, and in half of a matrix instruction."""

MIN_SLOTS, MAX_SLOTS = 3, 4
"""Numbers of slots of the ring. With more than 4, the first copies delay the first multiplication."""

RESERVED_BYTES = 2048
"""Bytes of shared memory that are left to the compiler of the kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that do not depend on the division of the work.

    A *unit* of work is a group of input channels of one tile of outputs, for a batch of activation rows.

    Attributes:
      stored_k: Number of input channels, padded to whole groups.
      stored_n: Number of outputs, padded to whole pieces.
      level: Number of planes that are read, 1 to 4.
      rows: Number of activation rows.
      multiprocessors: Number of multiprocessors of the device; each runs one CTA.
      shared_limit: Most bytes of shared memory of a CTA.
    """

    stored_k: int
    stored_n: int
    level: int
    rows: int
    multiprocessors: int
    shared_limit: int

    # --- activation rows ------------------------------------------------------------------------------
    @property
    def max_octets(self) -> int:
        """Largest number of octets of a CTA."""
        return MAX_OCTETS

    @property
    def row_batches(self) -> int:
        """Number of batches of activation rows. The rows of a batch share one read of the planes."""
        return -(-self.rows // (OCTET * self.max_octets))

    @property
    def octets(self) -> int:
        """Number of octets of activation rows of a CTA."""
        return -(-self.rows // (OCTET * self.row_batches))

    @property
    def rows_per_cta(self) -> int:
        """Number of rows of a batch, padded to whole octets."""
        return OCTET * self.octets

    # --- outputs --------------------------------------------------------------------------------------
    @property
    def total_pieces(self) -> int:
        """Number of pieces of the row of a plane."""
        return self.stored_n // layout.PIECE

    @property
    def tiles(self) -> int:
        """Number of tiles of outputs. The last one may have fewer pieces."""
        return -(-self.total_pieces // PIECES)

    # --- input channels -------------------------------------------------------------------------------
    @property
    def groups(self) -> int:
        """Number of groups of input channels."""
        return self.stored_k // layout.GROUP

    # --- planes ---------------------------------------------------------------------------------------
    @property
    def stored_row_bytes(self) -> int:
        """Bytes of the row of a plane."""
        return self.total_pieces * PIECE_BYTES

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane."""
        return self.stored_k * self.stored_row_bytes

    @property
    def plane_unit_bytes(self) -> int:
        """Bytes of a plane in a unit."""
        return layout.GROUP * TILE_ROW_BYTES


class Geometry(Sizes):
    """Sizes of a launch.

    The units of a batch are numbered group by group, tile after tile. Each CTA of the batch has
    ``units_per_cta`` consecutive ones, so that all multiprocessors have the same amount of work. The units
    of a CTA in one tile give a partial sum.
    """

    # --- division of the work -------------------------------------------------------------------------
    @property
    def units(self) -> int:
        """Number of units of a batch."""
        return self.tiles * self.groups

    @functools.cached_property
    def units_per_cta(self) -> int:
        """Number of units of a CTA; the last CTA of a batch may have fewer.

        Up to a sixteenth more than necessary, if tiles then have fewer partial sums.
        """
        least = -(-self.units // max(1, self.multiprocessors // self.row_batches))
        return min(range(least, least + least // 16 + 1), key=lambda each: (self._splits(each), each))

    def _splits(self, each: int) -> int:
        """Returns the largest number of CTAs with ``each`` units that share a tile."""
        first = (tile * self.groups for tile in range(self.tiles))
        return max((unit + self.groups - 1) // each - unit // each + 1 for unit in first)

    @property
    def batch_blocks(self) -> int:
        """Number of CTAs of a batch."""
        return -(-self.units // self.units_per_cta)

    @property
    def blocks(self) -> int:
        """Number of CTAs. Those of different batches with the same units are neighbours."""
        return self.batch_blocks * self.row_batches

    @property
    def splits(self) -> int:
        """Number of partial sums of each output."""
        return self._splits(self.units_per_cta)

    # --- shared memory: a ring of slots, each with the planes, activations and scales of a unit -----------
    @property
    def x_base(self) -> int:
        """Offset of the activations in a slot."""
        return self.level * self.plane_unit_bytes

    @property
    def x_distance(self) -> int:
        """Bytes from 8 channels of the activations to the next 8.

        The rows follow each other. The distance is odd in units of 16 bytes, so that the copies of a row lie
        in all banks.
        """
        return COPY_BYTES * (self.rows_per_cta + 1)

    @property
    def block_bytes(self) -> int:
        """Bytes of the activations in a block of channels."""
        return BLOCK_CHANNELS // COPY_CHANNELS * self.x_distance

    @property
    def scales_base(self) -> int:
        """Offset of the scales in a slot."""
        return self.x_base + BLOCKS * self.block_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.scales_base + SCALES_BYTES

    @property
    def slots(self) -> int:
        """Number of slots: of the unit that is multiplied, the one before, and of those that are copied.

        The unit before needs its slot until all warps have multiplied it.
        """
        return max(MIN_SLOTS, min(MAX_SLOTS, (self.shared_limit - RESERVED_BYTES) // self.slot_bytes))

    @property
    def ahead(self) -> int:
        """Number of units that are copied ahead."""
        return self.slots - 2

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a CTA."""
        return self.slots * self.slot_bytes
