"""Static sizes of a launch of the product at one level, and its shared memory."""

import dataclasses
import functools

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES

WARPS = 8
"""Number of warps in a CTA. Two on each scheduler leave a lane all 255 registers."""

THREADS = WARPS * LANES
"""Number of threads in a CTA."""

MATRIX_CHANNELS = 32
"""Number of input channels in a matrix instruction."""

GROUP_MATRICES = layout.GROUP // MATRIX_CHANNELS
"""Number of matrix instructions that cover the channels of a group."""

OCTET = 8
"""Number of activation rows whose operands a lane loads at once: 16 columns of B, two for each row."""

MAX_OCTETS = 4
"""Largest number of octets of a warp. Its sums and totals then take 192 registers of a lane."""

WARPGROUP_ROWS: int | None = None
"""Smallest number of activation rows that a GPU of compute capability 9.0 multiplies in warpgroups. None for
never, because nothing has been measured."""

MOST_CODED_ROWS = 16
"""Largest number of activation rows that the CTAs code themselves."""

PIECE_BYTES = layout.PIECE // 4
"""Bytes of a piece in a row of a plane."""

RECORD_BYTES = 32
"""Bytes of an activation row in the records of a group (see ``lane_context.Refs``)."""

MAX_SLOTS = 8
"""Largest number of slots for steps."""

LARGE_STEPS_BYTES = 128 * 1024
"""Bytes of shared memory in which several large steps fit."""

RESERVED_BYTES = 2048
"""Bytes of shared memory that are left to the compiler of the kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a launch.

    A *unit* of work is a group of input channels of one tile of outputs, for a batch of activation rows. The
    units of a batch are numbered group by group, tile after tile. Each CTA of the batch has
    ``units_per_cta`` consecutive ones, so that all multiprocessors have the same amount of work. The units
    of a CTA in one tile give a partial sum.

    Attributes:
      in_features: Number of input channels.
      stored_k: Number of input channels, padded to whole groups.
      stored_n: Number of outputs, padded to whole pieces.
      level: Number of planes that are read, 1 to 4.
      rows: Number of activation rows.
      multiprocessors: Number of multiprocessors of the device; each runs one CTA.
      shared_limit: Most bytes of shared memory of a CTA.
      warpgroups: Whether the warps multiply in warpgroups, with B in shared memory.
    """

    in_features: int
    stored_k: int
    stored_n: int
    level: int
    rows: int
    multiprocessors: int
    shared_limit: int
    warpgroups: bool = False

    # --- activation rows ------------------------------------------------------------------------------
    @property
    def row_parts(self) -> int:
        """Number of warps, 1 or 2, that divide the activation rows of the same outputs."""
        return 1 if self.rows <= OCTET * MAX_OCTETS else 2

    @property
    def row_batches(self) -> int:
        """Number of batches of activation rows. The rows of a batch share one read of the planes."""
        return -(-self.rows // (OCTET * MAX_OCTETS * self.row_parts))

    @property
    def octets(self) -> int:
        """Number of octets of activation rows of a warp, 1 to 4."""
        return -(-self.rows // (OCTET * self.row_parts * self.row_batches))

    @property
    def rows_per_cta(self) -> int:
        """Number of rows of a batch, padded to whole octets for each warp."""
        return OCTET * self.octets * self.row_parts

    @property
    def codes_activations(self) -> bool:
        """Whether the CTAs code the activations themselves. For many rows a launch of its own does it.

        Every tile needs the codes of all groups, so the CTAs together code each activation many times. For
        few rows they have the time, because they wait for memory.
        """
        return self.rows <= MOST_CODED_ROWS

    # --- outputs --------------------------------------------------------------------------------------
    @property
    def pieces(self) -> int:
        """Number of pieces of the row of a plane in a CTA's tile, 8 or 4. Each warp has one of them."""
        return WARPS // self.row_parts

    @property
    def total_pieces(self) -> int:
        """Number of pieces of the row of a plane."""
        return self.stored_n // layout.PIECE

    @property
    def tiles(self) -> int:
        """Number of tiles of outputs. The last one may have fewer pieces."""
        return -(-self.total_pieces // self.pieces)

    # --- division of the work -------------------------------------------------------------------------
    @property
    def groups(self) -> int:
        """Number of groups of input channels."""
        return self.stored_k // layout.GROUP

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

    # --- steps: what is copied into one slot of the ring, between two barriers --------------------------
    @property
    def step_matrices(self) -> int:
        """Number of matrix instructions that cover the channels of a step: 2 or 4.

        With few activation rows the kernel waits for memory, and starts sooner with small steps. With many
        rows it waits for the matrix unit, which is idle at every barrier, so steps are large if they fit.
        """
        return 2 if self.row_parts == 1 or self.shared_limit < LARGE_STEPS_BYTES else 4

    @property
    def step_channels(self) -> int:
        """Number of input channels in a step."""
        return self.step_matrices * MATRIX_CHANNELS

    @property
    def group_steps(self) -> int:
        """Number of steps in a group."""
        return GROUP_MATRICES // self.step_matrices

    # --- planes in memory -----------------------------------------------------------------------------
    @property
    def stored_row_bytes(self) -> int:
        """Bytes of the row of a plane."""
        return self.total_pieces * PIECE_BYTES

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane."""
        return self.stored_k * self.stored_row_bytes

    # --- shared memory: a ring of slots for steps, then one for groups ------------------------------------
    @property
    def row_bytes(self) -> int:
        """Bytes of the row of a plane in a tile."""
        return self.pieces * PIECE_BYTES

    @property
    def plane_step_bytes(self) -> int:
        """Bytes of a plane in a step."""
        return self.step_channels * self.row_bytes

    @property
    def matrix_code_bytes(self) -> int:
        """Bytes of the codes of all activation rows of a CTA for one matrix instruction's channels."""
        return 2 * MATRIX_CHANNELS * self.rows_per_cta

    @property
    def group_code_bytes(self) -> int:
        """Bytes of the codes of all activation rows of a CTA in a group."""
        return GROUP_MATRICES * self.matrix_code_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of the records of a group."""
        return self.rows_per_cta * RECORD_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot for a step: its planes, then its codes if they are copied."""
        codes = 0 if self.codes_activations else self.step_matrices * self.matrix_code_bytes
        return self.level * self.plane_step_bytes + codes

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales of a group."""
        return self.pieces * layout.PIECE * 2

    @property
    def group_bytes(self) -> int:
        """Bytes of a slot for a group: its scales, then its records if they are copied."""
        return self.scales_bytes + (0 if self.codes_activations else self.record_bytes)

    @property
    def slots(self) -> int:
        """Number of slots for steps, at least 2. All but one are in flight."""

        limit = self.shared_limit - RESERVED_BYTES
        sizes = (n for n in range(2, MAX_SLOTS + 1) if self._shared_bytes(n) <= limit)
        return max(sizes, default=2)

    def _group_slots(self, slots: int) -> int:
        """Returns the number of slots for groups: of the current one, and of those its last step copies."""
        return 1 + (self.group_steps - 1 + slots - 1) // self.group_steps

    def _shared_bytes(self, slots: int) -> int:
        coded = 2 * self.coded_bytes if self.codes_activations else 0
        return slots * self.slot_bytes + self._group_slots(slots) * self.group_bytes + coded

    @property
    def coded_bytes(self) -> int:
        """Bytes of the codes and records of a group, which the CTA computes one group ahead."""
        return self.group_code_bytes + self.record_bytes

    @property
    def group_slots(self) -> int:
        """Number of slots for groups."""
        return self._group_slots(self.slots)

    @property
    def groups_base(self) -> int:
        """Offset of the slots for groups."""
        return self.slots * self.slot_bytes

    @property
    def coded_base(self) -> int:
        """Offset of the codes and records that the CTA computes, of two groups in turn."""
        return self.groups_base + self.group_slots * self.group_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a CTA."""
        return self._shared_bytes(self.slots)
