"""Static sizes of a launch of the graded matvec: how the work is cut into CTAs, and the shared-memory map."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Value

WARPS_PER_WARPGROUP = 4
"""Number of warps in a warpgroup. Mosaic GPU launches whole warpgroups."""

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
class SharedList:
    """Tuning of ``shared_list.program``. It does not change the result.

    Attributes:
      warps: Number of warps in a CTA, 8, or 4 if ``Config.warpgroups`` is 1. Each multiplies one or two
        16-byte pieces of every listed plane row. With fewer warps there are fewer instructions, but more
        accumulators in each lane.
      ring_slots: Number of steps that the ring of a CTA holds: 4, 8 or 16. All but one are in flight.
      step_entries: Number of plane rows in a step, 32 or 64. With more, there are fewer barriers of the CTA,
        one for each step, and more padding, because every section of channels is padded to whole steps.
    """

    warps: int = 8
    ring_slots: int = 8
    step_entries: int = 32

    def __post_init__(self):
        for name, allowed in (("warps", (4, 8)), ("ring_slots", (4, 8, 16)), ("step_entries", (32, 64))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"SharedList.{name} must be one of {allowed}, not {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytePairs:
    """Tuning of ``byte_pairs.program``. It does not change the result.

    Attributes:
      ring_slots: Number of 2-KiB slots in the ring of a warp: 2, 4 or 8. All but one are in flight.
    """

    ring_slots: int = 4

    def __post_init__(self):
        if self.ring_slots not in (2, 4, 8):
            raise ValueError(f"BytePairs.ring_slots must be one of (2, 4, 8), not {self.ring_slots!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterList:
    """Tuning of ``cluster_list.program``. It does not change the result.

    Attributes:
      ctas: Number of CTAs in a cluster, 1, 2, 4 or 8. They divide the channels of one CTA of the program for
        one row. More than one needs compute capability 9.0. With more, the grid is finer, and a CTA needs
        less shared memory.
      warps: Number of warps in a CTA, 4 or 8, and at least as many as it has sections. Each multiplies two or
        one 16-byte pieces of every listed plane row. With fewer warps there are fewer instructions, but more
        accumulators in each lane.
      tiles: Number of tiles, 1, 2 or 4, that a cluster multiplies one after the other, with one list and one
        set of codes. With more, there are fewer instructions, and the grid is coarser. 1 is used instead if
        the last tile has fewer pieces, or the number of tiles is not a multiple.
      ring_slots: Number of steps that the ring of a CTA holds: 4, 8 or 16. All but one are in flight.
      step_entries: Number of plane rows in a step, 32 or 64, as in ``SharedList``.
    """

    ctas: int = 4
    warps: int = 8
    tiles: int = 1
    ring_slots: int = 8
    step_entries: int = 32

    def __post_init__(self):
        for name, allowed in (
            ("ctas", (1, 2, 4, 8)),
            ("warps", (4, 8)),
            ("tiles", (1, 2, 4)),
            ("ring_slots", (4, 8, 16)),
            ("step_entries", (32, 64)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"ClusterList.{name} must be one of {allowed}, not {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of a launch. It affects the result only through the order of float32 sums.

    In launches with equal ``warpgroups`` and ``warps_per_group`` a row of the result has the same bits, for
    any number of other rows, in every program.

    Attributes:
      warpgroups: Number of warpgroups (4 warps) in a CTA, 1 or 2. With more, a CTA sums over more groups of
        channels, so there are fewer partial sums; with fewer, the grid is finer.
      warps_per_group: Number of warps, 1, 2 or 4, that share the channels of one group. With more, the grid
        is finer, which helps small weights; with fewer, the lists are longer and contain less padding, and
        there are fewer partial sums.
      ring_slots: Number of 1-KiB slots in the ring of a warp: 2, 4, 8 or 16. A warp keeps ``ring_slots - 1``
        KiB of copies in flight.
      shared_list: Tuning of the program whose CTAs share one list, for 2 to 16 activation rows.
      byte_pairs: Tuning of the program that multiplies pairs of bytes, for several activation rows.
      cluster_list: Tuning of the program that divides a list among the CTAs of a cluster, for several
        activation rows. Without any of the three, the program for one row runs, which reads the weights once
        for each row.
    """

    warpgroups: int
    warps_per_group: int
    ring_slots: int
    shared_list: SharedList | None = None
    byte_pairs: BytePairs | None = None
    cluster_list: ClusterList | None = None

    def __post_init__(self):
        for name, allowed in (
            ("warpgroups", (1, 2)),
            ("warps_per_group", (1, 2, 4)),
            ("ring_slots", (2, 4, 8, 16)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Config.{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if self.shared_list is not None and self.shared_list.warps < self.warps:
            raise ValueError(
                f"Config.shared_list.warps must be {self.warps} with warpgroups={self.warpgroups},"
                f" not {self.shared_list.warps}"
            )
        programs = ("shared_list", "byte_pairs", "cluster_list")
        chosen = [f"Config.{name}" for name in programs if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} name different programs: set one of them")
        if self.cluster_list is not None and self.cluster_list.ctas > self.warps:
            raise ValueError(
                f"Config.cluster_list.ctas must be at most {self.warps} with warpgroups={self.warpgroups},"
                f" not {self.cluster_list.ctas}"
            )
        if self.cluster_list is not None and self.warps > self.cluster_list.ctas * self.cluster_list.warps:
            raise ValueError(
                f"Config.cluster_list must have at least {self.warps} warps in a cluster with"
                f" warpgroups={self.warpgroups}, not {self.cluster_list.ctas} CTAs of"
                f" {self.cluster_list.warps} warps"
            )

    @property
    def warps(self) -> int:
        """Number of warps in a CTA."""
        return WARPS_PER_WARPGROUP * self.warpgroups

    @property
    def groups_per_cta(self) -> int:
        """Number of groups of input channels that a CTA sums over."""
        return self.warps // self.warps_per_group


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
    def cluster(self) -> int:
        """Number of consecutive CTAs that form a cluster."""
        return 1

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
