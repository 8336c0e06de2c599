"""Static sizes of one graded matvec on a GPU: how the work is cut into CTAs, and the shared memory map."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES

WARPS_PER_WARPGROUP = 4
"""Mosaic GPU launches whole warpgroups."""

STEP_ROWS = 8
"""Rows (one channel of one plane each) that a warp multiplies at once: K = 32 of the matrix instruction
over the 4 byte positions of a word."""

ROW_BYTES = layout.TILE_WORDS * 4
"""Bytes of one row in one tile: 512 two-bit digits."""

STEP_BYTES = STEP_ROWS * ROW_BYTES
"""Bytes that one step reads, and of one slot of the ring: 1 KiB."""

TILE_OUTPUT_BYTES = layout.TILE * 4
"""Bytes of one tile of float32 outputs."""

SCALES_BYTES = layout.TILE * 2
"""Bytes of the scales of one slice in one tile."""

MAX_ROWS = 8
"""Activation rows (batch) that a launch takes."""

MAX_ROWS_PER_CTA = 4
"""Activation rows that share one read of the weights: each takes 32 accumulators a lane."""

SHARED_BYTES_LIMIT = 99 * 1024
"""Shared memory that one CTA can have on every supported architecture (sm_89 has the least)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How one launch is tuned. None of it changes the result, except the order of float32 sums.

    Attributes:
      warpgroups: warpgroups (of 4 warps) in a CTA, 1 or 2. More of them sum more slices inside the CTA,
        so fewer partial sums are written; fewer give a finer grid.
      warps_per_slice: 1, 2 or 4 warps share the channels of one slice. More of them give a finer grid for
        small shapes; fewer have longer lists, of which less is padding, and write fewer partial sums.
      ring_slots: 2, 4, 8 or 16 KiB of asynchronous copies in flight for each warp, less one.
    """

    warpgroups: int
    warps_per_slice: int
    ring_slots: int

    def __post_init__(self):
        for name, allowed in (
            ("warpgroups", (1, 2)),
            ("warps_per_slice", (1, 2, 4)),
            ("ring_slots", (2, 4, 8, 16)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Config.{name} must be one of {allowed}, not {getattr(self, name)!r}")

    @property
    def warps(self) -> int:
        """Warps in a CTA."""
        return WARPS_PER_WARPGROUP * self.warpgroups

    @property
    def slices_per_cta(self) -> int:
        """Slices of 128 input channels that a CTA sums."""
        return self.warps // self.warps_per_slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of one launch.

    A CTA computes, for up to ``rows_per_cta`` activation rows, one tile of 512 outputs over
    ``config.slices_per_cta`` slices of input channels. The grid runs over row groups (fastest, so that
    they share the L2), tiles, and groups of slices, each of which writes its own partial sum.

    Attributes:
      in_features: logical K; channels from there on are padding.
      stored_k: K padded to the slice.
      stored_n: N padded to the tile.
      planes: stored planes, 1 to 4.
      rows: activation rows, 1 to 8.
      x_dtype: "float32", "bfloat16" or "float16".
      config: the tuning.
      squares: parts that the mean square comes in, by the root of which y is divided; 0: y is not divided.
      eps: added to the mean square.
    """

    in_features: int
    stored_k: int
    stored_n: int
    planes: int
    rows: int
    x_dtype: str
    config: Config
    squares: int = 0
    eps: float = 0.0

    @property
    def x_bytes(self) -> int:
        """Bytes of one activation."""
        return 4 if self.x_dtype == "float32" else 2

    @property
    def slices(self) -> int:
        return self.stored_k // layout.GROUP

    @property
    def tiles(self) -> int:
        return self.stored_n // layout.TILE

    @property
    def slice_groups(self) -> int:
        """Groups of slices, hence partial sums of each output. The last group may be incomplete."""
        return -(-self.slices // self.config.slices_per_cta)

    @property
    def has_padding(self) -> bool:
        """Whether some lanes have channels that do not exist: K's padding, or slices past the last one."""
        return self.in_features < self.slice_groups * self.config.slices_per_cta * layout.GROUP

    @property
    def row_groups(self) -> int:
        return -(-self.rows // MAX_ROWS_PER_CTA)

    @property
    def rows_per_cta(self) -> int:
        """Rows in a group, as even as possible. The last group may be incomplete."""
        return -(-self.rows // self.row_groups)

    @property
    def matvec_blocks(self) -> int:
        """CTAs that multiply."""
        return self.row_groups * self.tiles * self.slice_groups

    @property
    def blocks(self) -> int:
        """CTAs in the grid: those that multiply, and one for each activation row that counts its levels."""
        return self.matvec_blocks + self.rows

    @property
    def threads(self) -> int:
        """Threads in a CTA."""
        return self.config.warps * LANES

    @property
    def outputs_per_thread(self) -> int:
        """Consecutive outputs of a tile that one thread sums over the CTA's warps: 4 or 2."""
        return layout.TILE // self.threads

    @property
    def channels_per_lane(self) -> int:
        """Channels that one lane grades."""
        return layout.GROUP // LANES // self.config.warps_per_slice

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one channel's whole row of one plane."""
        return self.stored_n // layout.WORD_DIGITS * 4

    @property
    def plane_bytes(self) -> int:
        return self.stored_k * self.stored_row_bytes

    # --- shared memory: of each warp, a list, then records, then scales, then rings -------------
    @property
    def entry_words(self) -> int:
        """Words of one list entry: the row's offset, then two activation rows' values to a word."""
        return 2 if self.rows_per_cta <= 2 else 4

    @property
    def entry_bytes(self) -> int:
        return 4 * self.entry_words

    @property
    def step_entries_bytes(self) -> int:
        """Bytes of the entries of one step."""
        return STEP_ROWS * self.entry_bytes

    @property
    def list_bytes(self) -> int:
        """Bytes of one warp's list: its channels in every plane, padded to a whole step."""
        return (self.planes * LANES * self.channels_per_lane + STEP_ROWS) * self.entry_bytes

    @property
    def record_base(self) -> int:
        return self.config.warps * self.list_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one warp's record: the sums and peaks of its rows."""
        return layout.round_up(4 * 2 * self.rows_per_cta, 16)

    @property
    def scales_base(self) -> int:
        return layout.round_up(self.record_base + self.config.warps * self.record_bytes, 128)

    @property
    def ring_base(self) -> int:
        return self.scales_base + self.config.warps * SCALES_BYTES

    @property
    def ring_bytes(self) -> int:
        """Bytes of one warp's ring, which holds one tile of its outputs at the end."""
        return max(self.config.ring_slots * STEP_BYTES, TILE_OUTPUT_BYTES)

    @property
    def shared_bytes(self) -> int:
        return self.ring_base + self.config.warps * self.ring_bytes
