"""Static sizes of a launch whose CTAs share one list, and the shared-memory map."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.matvec.mosaic_gpu.config import SharedList
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES, Geometry

PIECES = 8
"""Number of 16-byte pieces of a plane row in a tile. A piece has 64 outputs."""

MATRIX_ENTRIES = 32
"""Number of listed plane rows that one matrix instruction multiplies."""

ROWS_PER_MATRIX = 4
"""Number of activation rows in one matrix instruction: 8 columns of B, two of them for each row."""

TABLE_BYTES = 32
"""Bytes of an activation row in the table of thresholds, and in the table of records."""

FACTOR_OFFSET = 16
"""Offset of a row's norm factor, after its thresholds."""

PEAK_OFFSET = 16
"""Offset of a row's peak in its record, after its sums of codes."""

UNLISTED = 0xFFFF
"""Value that replaces the position of a plane row that is not in the list."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedListGeometry(Geometry):
    """Sizes of a launch of ``shared_list.program``.

    ``config.warpgroups`` and ``config.warps_per_group`` determine the order of float32 sums, as in the
    program for one row. A *section* is the channels of one warp in that program. Here all warps work on one
    section after the other.
    """

    @property
    def shared_list(self) -> SharedList:
        """Tuning of the program."""
        assert self.config.shared_list is not None
        return self.config.shared_list

    @property
    def warps(self) -> int:
        return self.shared_list.warps

    @property
    def pieces(self) -> int:
        """Number of pieces of a plane row that a warp multiplies: 1 or 2."""
        return PIECES // self.warps

    @property
    def row_batches(self) -> int:
        return 1

    @property
    def rows_per_cta(self) -> int:
        return self.rows

    @property
    def row_tiles(self) -> int:
        """Number of matrix instructions that cover the activation rows."""
        return -(-self.rows // ROWS_PER_MATRIX)

    # --- sections, and segments of sections that a warp lists ---------------------------------------------
    @property
    def sections(self) -> int:
        """Number of sections of a CTA: 4 or 8."""
        return self.config.warps

    @property
    def section_channels(self) -> int:
        """Number of input channels of a section."""
        return layout.GROUP // self.config.warps_per_group

    @property
    def section_chunks(self) -> int:
        """Number of chunks of 32 channels in a section."""
        return self.section_channels // LANES

    @property
    def cta_channels(self) -> int:
        """Number of input channels of a CTA."""
        return self.sections * self.section_channels

    @property
    def segment_chunks(self) -> int:
        """Number of chunks in a segment, the channels that one warp lists."""
        return max(1, self.cta_channels // LANES // self.warps)

    @property
    def segments(self) -> int:
        """Number of segments of a CTA. With 4, half of the warps list nothing."""
        return self.cta_channels // LANES // self.segment_chunks

    @property
    def segments_per_section(self) -> int:
        """Number of segments of a section: 1 or 2."""
        return self.segments // self.sections

    # --- how the warps divide the codes of a section ---------------------------------------------------
    @property
    def warps_per_row(self) -> int:
        """Number of warps that compute the codes of one activation row, each for some of the chunks."""
        padded_rows = 1 << (self.rows - 1).bit_length()
        return min(self.section_chunks, max(1, self.warps // padded_rows))

    @property
    def rows_at_once(self) -> int:
        """Number of activation rows whose codes the CTA computes at once."""
        return self.warps // self.warps_per_row

    # --- steps --------------------------------------------------------------------------------------
    @property
    def slots(self) -> int:
        """Number of steps that the ring holds."""
        return self.shared_list.ring_slots

    @property
    def step_matrices(self) -> int:
        """Number of matrix instructions whose entries (32) one step holds: 1 or 2."""
        return self.shared_list.step_entries // MATRIX_ENTRIES

    @property
    def step_entries(self) -> int:
        """Number of list entries of a step: 32 or 64."""
        return MATRIX_ENTRIES * self.step_matrices

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of the ring, which holds one step."""
        return ROW_BYTES * self.step_entries

    # --- shared memory: ``*_base`` is the offset of the first byte ---------------------------------------
    @property
    def section_capacity(self) -> int:
        """Largest number of entries of a section, padding included."""
        return layout.round_up(self.section_channels * self.planes, self.step_entries)

    @property
    def list_bytes(self) -> int:
        """Bytes of the list: the offset of each plane row."""
        return 4 * self.sections * self.section_capacity

    @property
    def position_words(self) -> int:
        """Number of 32-bit words of a channel in the table of positions. Each word holds two planes."""
        return -(-self.planes // 2)

    @property
    def positions_base(self) -> int:
        return self.list_bytes

    @property
    def thresholds_base(self) -> int:
        return self.positions_base + 4 * self.position_words * self.cta_channels

    @property
    def records_base(self) -> int:
        """The records of all activation rows: sums of codes and peak in the current section."""
        return self.thresholds_base + TABLE_BYTES * self.rows

    @property
    def counts_base(self) -> int:
        """The number of entries of each segment."""
        return self.records_base + TABLE_BYTES * self.rows

    @property
    def sections_base(self) -> int:
        """The number of entries of each section, without and with padding."""
        return self.counts_base + 4 * self.warps

    @property
    def codes_base(self) -> int:
        return self.sections_base + 8 * self.sections

    @property
    def codes_stride(self) -> int:
        """Bytes between the high and the low bytes of the codes of a row: 32 modulo 128.

        The 16 lanes of half a warp load 32 bytes from each of four such arrays without bank conflicts.
        """
        return self.section_capacity + (32 - self.section_capacity) % 128

    @property
    def totals_base(self) -> int:
        """The totals of the outputs, in rows with 16 bytes for each thread."""
        return layout.round_up(self.codes_base + 2 * self.rows * self.codes_stride, 128)

    @property
    def ring_base(self) -> int:
        return self.totals_base + self.row_tiles * self.pieces * 2 * 16 * self.threads

    @property
    def shared_bytes(self) -> int:
        return self.ring_base + self.slots * self.slot_bytes
