"""Tuning of a launch of the graded matvec: the program, and how it divides the work."""

import dataclasses

WARPS_PER_WARPGROUP = 4
"""Number of warps in a warpgroup. Mosaic GPU launches whole warpgroups."""


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
class DenseRows:
    """Tuning of ``dense_rows.program``. It does not change the result.

    Attributes:
      step_planes: Number of planes, 1, 2 or 4, of the 32 channels of a step.
      ring_slots: Number of steps that the ring of a CTA holds, 2, 4, 8 or 16.
      warpgroups: Whether a warpgroup multiplies its pieces with one instruction, which reads the codes from
        shared memory. Needs compute capability 9.0, and no other.
      tiles: Number of tiles, 1 to 4, that a CTA multiplies one after the other with the same codes.
      counting_ctas: Largest number of CTAs, 1 to 4, that compute the statistics.
    """

    step_planes: int = 2
    ring_slots: int = 8
    warpgroups: bool = False
    tiles: int = 1
    counting_ctas: int = 4

    def __post_init__(self):
        for name, allowed in (
            ("step_planes", (1, 2, 4)),
            ("ring_slots", (2, 4, 8, 16)),
            ("tiles", (1, 2, 3, 4)),
            ("counting_ctas", (1, 2, 3, 4)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"DenseRows.{name} must be one of {allowed}, not {getattr(self, name)!r}")


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
      byte_pairs: Tuning of the program that multiplies pairs of bytes, for several activation rows.
      dense_rows: Tuning of the program without lists, for several activation rows. Without ``byte_pairs``
        and ``dense_rows``, the program for one row runs, which reads the weights once for each row.
    """

    warpgroups: int
    warps_per_group: int
    ring_slots: int
    byte_pairs: BytePairs | None = None
    dense_rows: DenseRows | None = None

    def __post_init__(self):
        for name, allowed in (
            ("warpgroups", (1, 2)),
            ("warps_per_group", (1, 2, 4)),
            ("ring_slots", (2, 4, 8, 16)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Config.{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if self.byte_pairs is not None and self.dense_rows is not None:
            raise ValueError(
                "Config.byte_pairs and Config.dense_rows name different programs: set one of them"
            )

    @property
    def warps(self) -> int:
        """Number of warps in a CTA."""
        return WARPS_PER_WARPGROUP * self.warpgroups

    @property
    def groups_per_cta(self) -> int:
        """Number of groups of input channels that a CTA sums over."""
        return self.warps // self.warps_per_group
