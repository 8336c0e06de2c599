"""Static sizes of a launch of the graded matvec: how the work is cut into CTAs, and the shared-memory map."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.config import Config

STEP_ROWS = 8
"""Number of plane rows that a warp multiplies in one step: K = 32 of the matrix instruction, divided by the 4
bytes of a word. A plane row is one input channel of one plane."""

ROW_BYTES = layout.TILE_WORDS * 4
"""Bytes of one plane row in one whole tile: 512 digits of 2 bits."""

STEP_BYTES = STEP_ROWS * ROW_BYTES
"""Bytes that one step reads, and that one slot of the ring holds: 1 KiB."""

TILE_OUTPUT_BYTES = layout.TILE * 4
"""Bytes of one tile of float32 outputs."""

SCALES_BYTES = layout.TILE * 2
"""Bytes of the scales of one group in one tile."""

MAX_ROWS = 16
"""Largest number of activation rows in a launch."""

SHARED_BYTES_LIMIT = 99 * 1024
"""Bytes of shared memory that one CTA can have on every supported architecture; sm_89 has the fewest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a launch.

    A CTA computes one tile of outputs over ``config.groups_per_cta`` groups of input channels, for one
    activation row, or for up to ``rows_per_cta`` in the programs for several rows. The grid runs over row
    batches (fastest, because they share the L2), tiles and splits of the input channels. Each split writes a
    separate partial sum.

    Attributes:
      in_features: Logical number of input channels; later channels are padding.
      stored_k: Number of input channels, padded to whole groups.
      stored_n: Number of outputs, padded to whole pieces.
      planes: Number of stored planes, 1 to 4.
      rows: Number of activation rows, 1 to 16.
      x_dtype: "float32", "bfloat16" or "float16".
      config: Tuning.
      num_square_partials: Number of partial sums of the norm's mean square; 0 without a norm.
      eps: Epsilon of the norm.
    """

    in_features: int
    stored_k: int
    stored_n: int
    planes: int
    rows: int
    x_dtype: str
    config: Config
    num_square_partials: int = 0
    eps: float = 0.0

    @property
    def x_bytes(self) -> int:
        """Bytes of one activation."""
        return 4 if self.x_dtype == "float32" else 2

    @property
    def groups(self) -> int:
        """Number of groups of input channels."""
        return self.stored_k // layout.GROUP

    @property
    def tiles(self) -> int:
        """Number of tiles of outputs."""
        return -(-self.stored_n // layout.TILE)

    @property
    def last_tile_pieces(self) -> int:
        """Number of pieces in the last tile, 1 to 8. All other tiles have 8."""
        return layout.last_tile_pieces(self.stored_n)

    @property
    def splits(self) -> int:
        """Number of splits of the input channels, and of partial sums of each output.

        The last split may have fewer groups than the others.
        """
        return -(-self.groups // self.config.groups_per_cta)

    @property
    def has_padding(self) -> bool:
        """Whether some lanes have channels that do not exist: padding, or groups after the last."""
        return self.in_features < self.splits * self.config.groups_per_cta * layout.GROUP

    @property
    def row_batches(self) -> int:
        """Number of batches of activation rows. The rows of a batch share one read of the weights."""
        return self.rows

    @property
    def rows_per_cta(self) -> int:
        """Number of rows in a batch. The last batch may have fewer."""
        return -(-self.rows // self.row_batches)

    @property
    def matvec_blocks(self) -> int:
        """Number of CTAs that multiply."""
        return self.row_batches * self.tiles * self.splits

    @property
    def blocks(self) -> int:
        """Number of CTAs: those that multiply, and one for each activation row that counts its levels."""
        return self.matvec_blocks + self.rows

    @property
    def warps(self) -> int:
        """Number of warps in a CTA."""
        return self.config.warps

    @property
    def threads(self) -> int:
        """Number of threads in a CTA."""
        return self.warps * LANES

    @property
    def outputs_per_thread(self) -> int:
        """Number of consecutive outputs that one thread sums over the warps of the CTA: 4 or 2."""
        return layout.TILE // self.threads

    @property
    def channels_per_lane(self) -> int:
        """Number of channels that one lane grades."""
        return layout.GROUP // LANES // self.config.warps_per_group

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one plane row over all tiles."""
        return self.stored_n // layout.WORD_DIGITS * 4

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane."""
        return self.stored_k * self.stored_row_bytes

    @property
    def weight_scales_bytes(self) -> int:
        """Bytes of the scales of a weight."""
        return self.groups * self.stored_n * 2

    def x_row(self, row: Value) -> Value:
        """Returns the stored row of x that an activation row reads."""
        return row

    def threshold_row(self, row: Value) -> Value:
        """Returns the stored row of thresholds that an activation row is graded by."""
        return row

    # --- shared memory: the lists of all warps, then their records, scales and rings ------------
    @property
    def entry_words(self) -> int:
        """Number of 32-bit words of a list entry.

        The first is the offset of the plane row, and each of the next holds the codes of two activation rows.
        """
        return 2

    @property
    def entry_bytes(self) -> int:
        return 4 * self.entry_words

    @property
    def step_entries_bytes(self) -> int:
        """Bytes of the entries of one step."""
        return STEP_ROWS * self.entry_bytes

    @property
    def code_stride(self) -> int:
        """Bytes from the offset of an entry to its first word of codes, and between its words of codes."""
        return 4

    @property
    def list_bytes(self) -> int:
        """Bytes of one warp's list: its channels in every plane, and padding to a whole step."""
        return (self.planes * LANES * self.channels_per_lane + STEP_ROWS) * self.entry_bytes

    @property
    def record_base(self) -> int:
        return self.config.warps * self.list_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one warp's record: the sum of codes and the peak of each activation row."""
        return layout.round_up(4 * 2 * self.rows_per_cta, 16)

    @property
    def scales_base(self) -> int:
        return layout.round_up(self.record_base + self.config.warps * self.record_bytes, 128)

    @property
    def ring_base(self) -> int:
        return self.scales_base + self.config.warps * SCALES_BYTES

    @property
    def slots(self) -> int:
        """Number of slots in the ring of a warp."""
        return self.config.ring_slots

    @property
    def ring_bytes(self) -> int:
        """Bytes of one warp's ring. At the end the ring holds the warp's outputs of one tile."""
        return max(self.slots * STEP_BYTES, TILE_OUTPUT_BYTES)

    @property
    def shared_bytes(self) -> int:
        return self.ring_base + self.config.warps * self.ring_bytes
