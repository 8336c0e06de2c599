"""Static sizes of a launch with copies of boxes: options, division of the work, shared memory."""

import dataclasses
import functools

from pallas_kernels.matmul.mosaic_gpu.geometry import (
    ACTIVATION_BYTES,
    MAX_OCTETS,
    OCTET,
    RESERVED_BYTES,
    THREADS,
    Sizes,
)
from pallas_kernels.matmul.mosaic_gpu.operands import POSITIONS

MAX_CLUSTER = 8
"""Largest number of CTAs of a cluster on every device that has clusters."""

NEIGHBOURS = 16
"""Number of multiprocessors that are near enough for a cluster, at least: those of a GPC."""

X_ROW_BYTES = 128
"""Bytes of a row of a box of activations, 64 channels."""

X_ROW_CHANNELS = X_ROW_BYTES // ACTIVATION_BYTES
"""Channels of a row of a box of activations."""

MAX_SLOTS = 4
"""Largest number of slots of the ring."""

BARRIER_BYTES = 8
"""Bytes of an arrival barrier."""

ITEM_BYTES = 16 * THREADS
"""Bytes that a CTA sends for an octet of activation rows and a position: 4 sums of each lane."""


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Options of the program.

    Attributes:
      rounded: Whether the scales multiply the codes, which rounds weights to bfloat16, or the sums.
      rows: Largest number of activation rows of a CTA, 64 or, if ``rounded``, 128.
      exchange_units: Time in which a cluster adds up its sums of a tile, in units. It decides how many CTAs
        share a tile. The default assumes 11 bytes a cycle between multiprocessors.
    """

    rounded: bool = False
    rows: int = OCTET * MAX_OCTETS
    exchange_units: float = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxesGeometry(Sizes):
    """Sizes of a launch.

    A cluster of CTAs has some tiles of a batch of activation rows. In every tile, each of its CTAs has an
    equal part of the groups; then they add up their sums.

    Attributes:
      boxes: Options of the program.
    """

    boxes: Boxes

    @property
    def max_octets(self) -> int:
        return self.boxes.rows // OCTET

    # --- division of the work -------------------------------------------------------------------------
    @functools.cached_property
    def cluster(self) -> int:
        """Number of CTAs of a cluster: the one with the least work for each CTA."""

        def work(cluster: int) -> float:
            tiles = -(-self.tiles // self._most_clusters(cluster))
            return tiles * (-(-self.groups // cluster) + (self.boxes.exchange_units if cluster > 1 else 0))

        return min(range(1, min(MAX_CLUSTER, self.groups, self.multiprocessors) + 1), key=work)

    def _most_clusters(self, cluster: int) -> int:
        """Returns how many clusters of a batch run at the same time."""
        near = min(NEIGHBOURS, self.multiprocessors) if cluster > 1 else 1
        return max(1, self.multiprocessors // near * (near // cluster) // self.row_batches)

    @property
    def tiles_per_cluster(self) -> int:
        """Largest number of tiles of a cluster."""
        return -(-self.tiles // self._most_clusters(self.cluster))

    @property
    def clusters(self) -> int:
        """Number of clusters of a batch."""
        return -(-self.tiles // self.tiles_per_cluster)

    @property
    def blocks(self) -> int:
        """Number of CTAs."""
        return self.clusters * self.row_batches * self.cluster

    # --- shared memory: exchanged sums, a ring of slots with planes and activations of a unit, barriers --
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

    @functools.cached_property
    def exchanged_octets(self) -> int:
        """Number of octets whose sums the CTAs of a cluster exchange at once.

        The most that leave room for four slots, or else for three.
        """
        choices = [octets for octets in (16, 8, 4, 2, 1) if octets <= self.octets or octets == 1]
        return next(o for slots in (4, 3, 0) for o in choices if self._slots_beside(o) >= slots)

    def _slots_beside(self, octets: int) -> int:
        """Returns how many slots fit beside the exchange of some octets."""
        rest = self.shared_limit - RESERVED_BYTES - self._exchange_bytes(octets) - MAX_SLOTS * BARRIER_BYTES
        return rest // self.slot_bytes

    def _exchange_bytes(self, octets: int) -> int:
        """Returns the bytes of the sums of some octets that a CTA gets from its cluster."""
        return 0 if self.cluster == 1 else self.cluster * -(-octets * POSITIONS // self.cluster) * ITEM_BYTES

    @property
    def ring_base(self) -> int:
        """Offset of the ring; the exchanged sums lie before it."""
        return self._exchange_bytes(self.exchanged_octets)

    @property
    def slots(self) -> int:
        """Number of slots."""
        return min(MAX_SLOTS, self._slots_beside(self.exchanged_octets))

    @property
    def barriers_base(self) -> int:
        """Offset of the arrival barriers, one for each slot."""
        return self.ring_base + self.slots * self.slot_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a CTA."""
        return self.barriers_base + self.slots * BARRIER_BYTES
