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

TEAM = layout.TILE_PIECES // PIECES
"""Number of CTAs of a team. Together they read whole lines of 128 bytes of the planes."""

BLOCK_CHANNELS = 32
"""Number of input channels that a transposing load takes from each plane."""

BLOCKS = layout.GROUP // BLOCK_CHANNELS
"""Number of blocks of channels in a group."""

PRODUCTS = 2
"""Number of matrix instructions that cover the channels of a block."""

OCTET = 8
"""Number of activation rows, columns of B, that share the first registers of C."""

MAX_EXACT_ROWS, MAX_ROUNDED_ROWS = 64, 128
"""Most activation rows of a CTA. Sums and totals, or sums if rounded, take 128 registers of a lane."""

PIECE_BYTES = layout.PIECE // 4
"""Bytes of a piece in a row of a plane."""

TILE_ROW_BYTES = PIECES * PIECE_BYTES
"""Bytes of the row of a plane in a tile."""

ACTIVATION_BYTES = 2
"""Bytes of a bfloat16 activation."""

X_ROW_BYTES = 128
"""Bytes of a row of a box of activations, 64 channels."""

X_ROW_CHANNELS = X_ROW_BYTES // ACTIVATION_BYTES
"""Channels of a row of a box of activations."""

MAX_SLOTS = 4
"""Largest number of slots of the ring."""

BARRIER_BYTES = 8
"""Bytes of an arrival barrier."""

TILE_OUTPUTS = PIECES * layout.PIECE
"""Number of outputs of a tile."""

STAGED_ROW_BYTES = 4 * TILE_OUTPUTS + 32
"""Bytes between the sums of activation rows that wait to be stored. 32 more leave few bank conflicts."""

RESERVED_BYTES = 2048
"""Bytes of shared memory that are left to the compiler of the kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a launch.

    A *unit* of work is a group of input channels of one tile of outputs, for a batch of activation rows. The
    units of a batch are numbered group by group, stored tile after stored tile. Each *team* of ``TEAM`` CTAs,
    which have the halves of the same stored tiles, has ``units_per_cta`` consecutive ones, so that all
    multiprocessors have the same amount of work. The units of a CTA in one tile give a partial sum.

    Attributes:
      stored_k: Number of input channels, padded to whole groups.
      stored_n: Number of outputs, padded to whole pieces.
      level: Number of planes that are read, 1 to 4.
      rows: Number of activation rows.
      multiprocessors: Number of multiprocessors of the device; each runs one CTA.
      shared_limit: Most bytes of shared memory of a CTA.
      rounded: Whether the scales multiply the codes, which rounds weights to bfloat16, or the sums.
    """

    stored_k: int
    stored_n: int
    level: int
    rows: int
    multiprocessors: int
    shared_limit: int
    rounded: bool

    # --- activation rows ------------------------------------------------------------------------------
    @property
    def max_octets(self) -> int:
        """Largest number of octets of a CTA."""
        return (MAX_ROUNDED_ROWS if self.rounded else MAX_EXACT_ROWS) // OCTET

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
    def stored_tiles(self) -> int:
        """Number of stored tiles of outputs. The last one may have fewer pieces, even no second half."""
        return -(-self.total_pieces // (TEAM * PIECES))

    # --- input channels -------------------------------------------------------------------------------
    @property
    def groups(self) -> int:
        """Number of groups of input channels."""
        return self.stored_k // layout.GROUP

    # --- planes ---------------------------------------------------------------------------------------
    @property
    def plane_unit_bytes(self) -> int:
        """Bytes of a plane in a unit."""
        return layout.GROUP * TILE_ROW_BYTES

    # --- division of the work -------------------------------------------------------------------------
    @property
    def units(self) -> int:
        """Number of units of a batch that each CTA of a team has a part of."""
        return self.stored_tiles * self.groups

    @functools.cached_property
    def units_per_cta(self) -> int:
        """Number of units of a CTA; the last team of a batch may have fewer.

        Up to a sixteenth more than necessary, if tiles then have fewer partial sums.
        """
        least = -(-self.units // max(1, self.multiprocessors // (TEAM * self.row_batches)))
        return min(range(least, least + least // 16 + 1), key=lambda each: (self._splits(each), each))

    def _splits(self, each: int) -> int:
        """Returns the largest number of teams with ``each`` units that share a stored tile."""
        first = (tile * self.groups for tile in range(self.stored_tiles))
        return max((unit + self.groups - 1) // each - unit // each + 1 for unit in first)

    @property
    def teams(self) -> int:
        """Number of teams of a batch."""
        return -(-self.units // self.units_per_cta)

    @property
    def blocks(self) -> int:
        """Number of CTAs. Those of different batches with the same units are neighbours."""
        return TEAM * self.teams * self.row_batches

    @property
    def splits(self) -> int:
        """Number of partial sums of each output."""
        return self._splits(self.units_per_cta)

    # --- shared memory: a ring of slots with planes and activations of a unit, sums to be stored, barriers -
    @property
    def x_half_bytes(self) -> int:
        """Bytes of the activations of half of the channels of a unit, one box."""
        return X_ROW_BYTES * self.rows_per_cta

    @property
    def x_base(self) -> int:
        """Offset of the activations in a slot."""
        return self.level * self.plane_unit_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.x_base + 2 * self.x_half_bytes

    @property
    def slots(self) -> int:
        """Number of slots: of the unit that is multiplied, the next one, and of those that are copied."""
        others = 2 * self.staged_bytes + MAX_SLOTS * BARRIER_BYTES
        return min(MAX_SLOTS, (self.shared_limit - RESERVED_BYTES - others) // self.slot_bytes)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the sums of an octet that wait to be stored."""
        return OCTET * STAGED_ROW_BYTES

    @property
    def staging_base(self) -> int:
        """Offset of the sums of two octets that wait to be stored."""
        return self.slots * self.slot_bytes

    @property
    def barriers_base(self) -> int:
        """Offset of the arrival barriers, one for each slot."""
        return self.staging_base + 2 * self.staged_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a CTA."""
        return self.barriers_base + self.slots * BARRIER_BYTES
