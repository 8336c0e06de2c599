"""The instructions of copies by the tensor memory accelerator. They need compute capability 9.0."""

import abc
from collections.abc import Sequence
from typing import Any

from pallas_kernels.lanes.registers import Value


class BoxInstructions(abc.ABC):
    """Copies of boxes of an array, which no lane waits for until it needs them; a part of ``Instructions``.

    One lane starts a copy. It arrives on an *arrival barrier* (PTX ``mbarrier``), 8 bytes of shared memory. A
    phase of the barrier ends when one lane has said how many bytes to expect, and as many have arrived.
    Phases are numbered from 0.
    """

    @abc.abstractmethod
    def start_arrivals(self, barrier: Value) -> None:
        """Makes 8 bytes of shared memory an arrival barrier. Other lanes may use it after a barrier."""

    @abc.abstractmethod
    def expect_bytes(self, barrier: Value, count: int) -> None:
        """Says that the current phase ends after ``count`` bytes. One lane calls it once in each phase."""

    @abc.abstractmethod
    def copy_box(
        self,
        shared: Value,
        ref: Any,
        corner: Sequence[Value],
        box: tuple[int, ...],
        barrier: Value,
        *,
        evict_first: bool = False,
    ) -> None:
        """Starts copying a box of an array in global memory to shared memory.

        The last axis of the box has 64 or 128 bytes, the *row*. Rows follow each other in shared memory, but
        the 16-byte pieces of a row change places: with 128 bytes, piece ``p`` of row ``r`` is at ``p ^ (r %
        8)``, with 64 bytes at ``p ^ (r // 2 % 4)``. Elements outside of the array arrive as zeros.

        Args:
          shared: Address in shared memory, a multiple of 8 rows.
          ref: An argument of the kernel, whose strides are multiples of 16 bytes.
          corner: ``i32`` indices of the first element of the box, one for each axis.
          box: Sizes of the box, each at most 256.
          barrier: The arrival barrier.
          evict_first: See ``copy_async``.
        """

    @abc.abstractmethod
    def wait_arrival(self, barrier: Value, parity: Value) -> None:
        """Waits until a phase of this parity, 0 or 1, has ended: the current one, or else the one before.

        Then the lane, and products of its warpgroup, may read what has arrived. All lanes of a warp wait
        together.
        """
