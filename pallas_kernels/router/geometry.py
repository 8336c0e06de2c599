"""Static sizes of a launch of the router: how a router's kernel is cut into CTAs and loads."""

import dataclasses

from pallas_kernels.lanes.instructions import LANES

CLUSTER = 8
"""Number of CTAs that compute the scores of one row, the most that a cluster has on every architecture."""

MOST_FEATURES = 16384
"""Largest number of input channels: a thread stages 8 activations of the CTA's slice."""

MOST_EXPERTS = 512
"""Largest number of experts: a lane of the warp that chooses holds the scores of up to 16."""

VECTOR = 8
"""Number of neighbouring input channels that a thread reads together: 16 bytes of a row of bfloat16."""

LOADS_IN_FLIGHT = 16
"""Number of vectors of the router's kernel that a thread loads together, into 64 registers. If a thread of a
CTA of 256 had more, the CTA has 512 threads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterGeometry:
    """Sizes of one launch.

    A CTA reads ``slice_channels`` rows of the kernel ``[features, experts]``. Its threads form a grid: the
    *column* of a thread is its vector of neighbouring experts, its *band* the rows that it reads.

    Attributes:
      rows: Number of rows of activations.
      features: Number of input channels, a multiple of ``VECTOR``.
      experts: Number of experts.
      chosen: Number of experts that are chosen for each row, at most 32.
      normalized: Whether the chosen probabilities are divided by their sum.
      kernel_bytes: Bytes of a number of the kernel: 2 for bfloat16, 4 for float32.
      num_square_partials: Number of partial sums of the mean square of a row; 0 without a norm.
      eps: Epsilon of the norm.
      biased: Whether a bias is added to the scores.
    """

    rows: int
    features: int
    experts: int
    chosen: int
    normalized: bool
    kernel_bytes: int = 2
    num_square_partials: int = 0
    eps: float = 0.0
    biased: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the kernel."""
        return self.experts * self.kernel_bytes

    @property
    def vector_words(self) -> int:
        """Number of words that a thread loads from a row: the longest vector that is always aligned."""
        return next(words for words in (4, 2, 1) if self.row_bytes % (4 * words) == 0)

    @property
    def vector_experts(self) -> int:
        """Number of experts of a thread."""
        return 4 * self.vector_words // self.kernel_bytes

    @property
    def used_columns(self) -> int:
        """Number of vectors of a row."""
        return self.experts // self.vector_experts

    @property
    def columns(self) -> int:
        """``used_columns``, rounded up to a power of two."""
        return 1 << (self.used_columns - 1).bit_length()

    @property
    def slice_channels(self) -> int:
        """Number of input channels of a CTA."""
        return VECTOR * -(-self.features // (VECTOR * CLUSTER))

    def _band(self, threads: int) -> int:
        return VECTOR * -(-self.slice_channels * self.columns // (VECTOR * threads))

    @property
    def threads(self) -> int:
        """Number of threads in a CTA."""
        return 256 if self._band(256) <= LOADS_IN_FLIGHT and self.columns <= 256 else 512

    @property
    def band_channels(self) -> int:
        """Number of input channels of a thread, a multiple of ``VECTOR``."""
        return self._band(self.threads)

    @property
    def has_padding(self) -> bool:
        """Whether some threads have fewer input channels than ``band_channels``."""
        return self.staged_channels != self.slice_channels or CLUSTER * self.slice_channels != self.features

    @property
    def partial_rows(self) -> int:
        """Number of partial sums of a score in a CTA: of its warps, or bands."""
        return self.threads // max(self.columns, LANES)

    @property
    def partial_experts(self) -> int:
        """Number of scores of one partial sum, with those of unused columns."""
        return self.columns * self.vector_experts

    @property
    def experts_per_lane(self) -> int:
        """Number of neighbouring experts that a lane of the choosing warp holds, a power of two."""
        return 1 << (-(-self.experts // LANES) - 1).bit_length()

    @property
    def staged_channels(self) -> int:
        """Number of activations in shared memory: those of all bands."""
        return self.threads // self.columns * self.band_channels

    @property
    def x_base(self) -> int:
        """Shared-memory offset of the activations of the CTA, bfloat16 ``[staged_channels]``."""
        return 4 * self.partial_rows * self.partial_experts

    @property
    def gathered_base(self) -> int:
        """Shared-memory offset of the scores of all CTAs, f32 ``[CLUSTER, 32 experts_per_lane]``."""
        return self.x_base + 2 * self.staged_channels

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the scores of one CTA."""
        return 4 * LANES * self.experts_per_lane

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a CTA."""
        return self.gathered_base + CLUSTER * self.gathered_bytes

    @property
    def blocks(self) -> int:
        """Number of CTAs."""
        return CLUSTER * self.rows
