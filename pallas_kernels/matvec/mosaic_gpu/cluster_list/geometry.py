"""Static sizes of a launch whose clusters divide the channels, and the shared-memory map of a CTA."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.matvec.mosaic_gpu.config import ClusterList
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import (
    MATRIX_ENTRIES,
    PIECES,
    TABLE_BYTES,
    SharedListGeometry,
)

OUTPUT_BYTES = 16
"""Bytes of the outputs that a thread stores at once: four consecutive outputs of one activation row."""

BALLOTS_BYTES = 16
"""Bytes of the ballots of a warp, one for each plane."""

UNITS_BYTES = 16
"""Bytes of the factors from the activations of a row to its codes, one for each plane."""

CHUNK_SCALES_BYTES = layout.TILE // 4 * 2
"""Bytes of the scales of a chunk, 128 outputs of a whole tile, in one group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterListGeometry(SharedListGeometry):
    """Sizes of a launch of ``cluster_list.program``.

    A cluster has the channels of one CTA of the program for one row, and its CTAs divide the sections. All
    ``*_channels``, ``sections`` and bases are those of one CTA.
    """

    @property
    def cluster_list(self) -> ClusterList:
        """Tuning of the program."""
        assert self.config.cluster_list is not None
        return self.config.cluster_list

    @property
    def cluster(self) -> int:
        return self.cluster_list.ctas

    @property
    def warps(self) -> int:
        return self.cluster_list.warps

    @property
    def matvec_blocks(self) -> int:
        return self.tiles // self.tiles_per_cta * self.splits * self.cluster

    @property
    def tiles_per_cta(self) -> int:
        """Number of tiles that a CTA multiplies one after the other."""
        tiles = self.cluster_list.tiles
        return tiles if self.last_tile_pieces == PIECES and self.tiles % tiles == 0 else 1

    @property
    def blocks(self) -> int:
        """Number of CTAs: those that multiply, one for each activation row, and the rest of its cluster."""
        return self.matvec_blocks + layout.round_up(self.rows, self.cluster)

    @property
    def sections(self) -> int:
        """Number of sections of a CTA, 1 to 8."""
        return self.config.warps // self.cluster

    @property
    def passes(self) -> int:
        """Number of pairs of a tile and a section of a CTA."""
        return self.tiles_per_cta * self.sections

    @property
    def segment_parts(self) -> int:
        """Number of warps that divide the activation rows of a segment."""
        return self.warps // self.segments

    @property
    def slots(self) -> int:
        return self.cluster_list.ring_slots

    @property
    def step_matrices(self) -> int:
        return self.cluster_list.step_entries // MATRIX_ENTRIES

    # --- outputs of a section -------------------------------------------------------------------------
    @property
    def output_vectors(self) -> int:
        """Number of vectors of four outputs that a thread has: two for each piece and row tile."""
        return 2 * self.pieces * self.row_tiles

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector of every thread."""
        return OUTPUT_BYTES * self.threads

    @property
    def section_bytes(self) -> int:
        """Bytes of the outputs of a section in one tile."""
        return self.output_vectors * self.vector_bytes

    @property
    def group_chunks(self) -> int:
        """Number of chunks of a tile's outputs that a CTA adds: 2 with several CTAs in a cluster, else 4."""
        return 2 if self.cluster > 1 else 4

    # --- shared memory: the list, then tables, scales, codes, outputs and the ring --------------------------
    @property
    def list_bytes(self) -> int:
        """Bytes of the lists of all tiles: the offset of each plane row."""
        return 4 * self.passes * self.section_capacity

    @property
    def thresholds_base(self) -> int:
        return self.list_bytes

    @property
    def records_base(self) -> int:
        """The records ``[section][row]``: a sum of codes for each segment of the section, and the peak."""
        return self.thresholds_base + TABLE_BYTES * self.rows

    @property
    def counts_base(self) -> int:
        """The number of entries of each segment."""
        return self.records_base + TABLE_BYTES * self.rows * self.sections

    @property
    def ballots_base(self) -> int:
        """The plane rows that the activation rows of a warp read, ``[segment][part][plane]``."""
        return layout.round_up(self.counts_base + 4 * self.warps, BALLOTS_BYTES)

    @property
    def peaks_base(self) -> int:
        """The bits of the largest ``|x|``, ``[row][segment]``."""
        return self.ballots_base + BALLOTS_BYTES * self.warps

    @property
    def units_base(self) -> int:
        """The factors from activations to codes, ``[warp][row][plane]``."""
        return layout.round_up(self.peaks_base + 4 * self.warps * self.rows, UNITS_BYTES)

    @property
    def sections_base(self) -> int:
        """The number of entries of each section, without and with padding."""
        return self.units_base + UNITS_BYTES * self.warps * self.rows

    @property
    def scales_base(self) -> int:
        """The scales of the CTA's outputs, ``[group of the cluster][tile][chunk]``."""
        return layout.round_up(self.sections_base + 8 * self.sections, 128)

    @property
    def codes_base(self) -> int:
        chunks = self.config.groups_per_cta * self.tiles_per_cta * self.group_chunks
        return self.scales_base + chunks * CHUNK_SCALES_BYTES

    @property
    def codes_stride(self) -> int:
        """Bytes between the high and the low bytes of a row's codes, 32 modulo 128 as in ``shared_list``.

        A byte for each lane of each segment follows the codes of the list.
        """
        size = self.sections * self.section_capacity + LANES * self.segments
        return size + (32 - size) % 128

    @property
    def outputs_base(self) -> int:
        """The outputs of the CTA's passes. Those of the last pass take the place of the ring."""
        return layout.round_up(self.codes_base + 2 * self.rows * self.codes_stride, 128)

    @property
    def ring_base(self) -> int:
        return self.outputs_base + (self.passes - 1) * self.section_bytes

    @property
    def shared_bytes(self) -> int:
        return self.ring_base + max(self.slots * self.slot_bytes, self.section_bytes)


def chunks_of_segment(g: ClusterListGeometry) -> range:
    """Returns the offsets of the lane's channels in a segment."""
    return range(0, LANES * g.segment_chunks, LANES)
