"""Static sizes of a launch that multiplies without a list, and the shared-memory map."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.matvec.mosaic_gpu.config import DenseRows
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES, Geometry

BLOCK_BYTES = LANES * ROW_BYTES
"""Bytes of a block: the plane rows of 32 channels in one plane and one tile."""

ROWS_PER_MATRIX = 4
"""Number of activation rows in one matrix instruction: 8 columns of B, two of them for each row."""

CHANNELS_PER_LANE = 4
"""Number of consecutive channels whose codes a lane computes: one byte of a word for each."""

WARPS = layout.TILE_PIECES
"""Number of warps of a CTA. Each multiplies one 16-byte piece of every plane row."""

CHUNK_PADDING = {False: 64, True: 16}
"""Bytes between the codes of two chunks of 32 channels, without and with warpgroups. They avoid bank
conflicts of the stores."""

RECORD_BYTES = 8
"""Bytes of a record: the factors that convert the sums of an activation row in a section."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseRowsGeometry(Geometry):
    """Sizes of a launch of ``dense_rows.program``.

    ``config.warpgroups`` and ``config.warps_per_group`` determine the order of float32 sums, as in the
    program for one row. A *section* is the channels of one warp in that program.
    """

    @property
    def dense(self) -> DenseRows:
        """Tuning of the program."""
        assert self.config.dense_rows is not None
        return self.config.dense_rows

    # --- warps and activation rows --------------------------------------------------------------------
    @property
    def warps(self) -> int:
        return WARPS

    @property
    def row_batches(self) -> int:
        return 1

    @property
    def rows_per_cta(self) -> int:
        return self.rows

    @property
    def row_tiles(self) -> int:
        """Number of matrix instructions that cover the activation rows; even with warpgroups."""
        tiles = -(-self.rows // ROWS_PER_MATRIX)
        return tiles + tiles % 2 if self.dense.warpgroups else tiles

    @property
    def padded_rows(self) -> int:
        """Number of activation rows with those that fill the last row tile."""
        return ROWS_PER_MATRIX * self.row_tiles

    # --- tiles ------------------------------------------------------------------------------------------
    @property
    def tile_groups(self) -> int:
        """Number of CTAs that share the tiles of a split."""
        return -(-self.tiles // self.dense.tiles)

    @property
    def matvec_blocks(self) -> int:
        return self.tile_groups * self.splits

    @property
    def counting_blocks(self) -> int:
        """Number of CTAs that compute the statistics of the activation rows."""
        return min(self.rows, self.dense.counting_ctas)

    @property
    def blocks(self) -> int:
        return self.matvec_blocks + self.counting_blocks

    # --- sections and steps -----------------------------------------------------------------------------
    @property
    def sections(self) -> int:
        """Number of sections of a CTA: 4 or 8."""
        return self.config.warps

    @property
    def section_channels(self) -> int:
        """Number of input channels of a section: 32, 64 or 128."""
        return layout.GROUP // self.config.warps_per_group

    @property
    def section_chunks(self) -> int:
        """Number of chunks of 32 channels in a section."""
        return self.section_channels // LANES

    @property
    def cta_groups(self) -> int:
        """Number of groups of a CTA."""
        return self.config.groups_per_cta

    @property
    def cta_chunks(self) -> int:
        """Number of chunks of a CTA."""
        return self.sections * self.section_chunks

    @property
    def step_planes(self) -> int:
        """Number of planes in a step; fewer in the last step of a chunk if they do not divide the planes."""
        return min(self.dense.step_planes, self.planes)

    @property
    def steps(self) -> list[tuple[int, range]]:
        """The steps of a section: chunk of the section, and planes."""
        return [
            (chunk, range(first, min(first + self.step_planes, self.planes)))
            for chunk in range(self.section_chunks)
            for first in range(0, self.planes, self.step_planes)
        ]

    @property
    def loads_scales_ahead(self) -> bool:
        """Whether the scales of a section are loaded during the one before. More rows lack the registers."""
        return self.row_tiles <= 2

    @property
    def slots(self) -> int:
        """Number of steps that the ring holds."""
        return self.dense.ring_slots

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of the ring: the blocks ``[plane]`` of a step."""
        return self.step_planes * BLOCK_BYTES

    # --- how the warps divide the codes: a warp codes one row in one group at a time -------------------
    @property
    def coded_rows(self) -> int:
        """``padded_rows``, rounded up to a power of two."""
        return 1 << (self.padded_rows - 1).bit_length()

    @property
    def rows_per_warp(self) -> int:
        """Number of activation rows that a warp codes."""
        return max(1, self.coded_rows // self.warps)

    @property
    def groups_at_once(self) -> int:
        """Number of groups that the CTA codes at once."""
        return min(self.cta_groups, max(1, self.warps // self.coded_rows))

    @property
    def rounds(self) -> int:
        """Number of rounds in which the CTA codes its groups."""
        return self.cta_groups // self.groups_at_once

    @property
    def first_steps(self) -> int:
        """Number of steps whose copies start after the first round."""
        channels = self.groups_at_once * layout.GROUP
        return min(self.slots, channels // self.section_channels * len(self.steps))

    # --- shared memory: ``*_base`` is the offset of the first byte ---------------------------------------
    @property
    def unit_bytes(self) -> int:
        """Bytes of the codes of a chunk in a plane: high and low bytes of all rows."""
        return 2 * LANES * self.padded_rows

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the codes of a chunk."""
        return self.planes * self.unit_bytes + CHUNK_PADDING[self.dense.warpgroups]

    @property
    def masks_base(self) -> int:
        """Words ``[group][plane][32]``: the bytes that are not 0 belong to channels that some row reads."""
        return layout.round_up(self.cta_chunks * self.chunk_bytes, 128)

    @property
    def masks_bytes(self) -> int:
        """Bytes of the words of all groups."""
        return self.cta_groups * self.planes * layout.GROUP

    @property
    def records_base(self) -> int:
        """Records ``[section][row]``."""
        return self.masks_base + self.masks_bytes

    @property
    def ring_base(self) -> int:
        return layout.round_up(self.records_base + self.sections * self.padded_rows * RECORD_BYTES, 128)

    @property
    def shared_bytes(self) -> int:
        return self.ring_base + self.slots * self.slot_bytes
