"""The instructions that a warpgroup executes together (``wgmma``). Only compute capability 9.0 has them."""

import abc
from collections.abc import Callable, Sequence

from pallas_kernels.lanes.registers import Value


class WarpgroupInstructions(abc.ABC):
    """Matrix products with B in shared memory; a part of ``instructions.Instructions``."""

    @abc.abstractmethod
    def queue_warpgroup_multiply_add(
        self, c: Sequence[Sequence[Value]], a: Sequence[Sequence[Value]], b: Value, offset: int
    ) -> list[list[Value]]:
        """Queues ``C + A @ B`` for several pairs of A and C, with B in shared memory (``wgmma.m64nNk32``).

        A is uint8, B int8, C int32. Needs compute capability 9.0. Each warp has A and C ``[16, N]`` of its
        own, with N a multiple of 16 up to 64. A is that of ``matrix_multiply_add``; the registers
        ``4 t ..+3`` of C are its C for columns ``8 t ..+7``. The warps of a warpgroup (4 consecutive ones)
        have one B. From address ``b + offset`` on, its element ``[k, n]`` is byte ``256 (n // 8) + 128 (k //
        16) + 16 (n % 8) + k % 16``; ``b`` and ``offset`` are multiples of 16.

        The matrix unit multiplies while the warp goes on. The call waits for what was queued before. Only the
        next ``queue_warpgroup_multiply_add`` or ``finish_warpgroup_multiply_add`` may use the result. A loop
        must not carry it: at the end of a loop the compiler may copy registers that are still written.
        """

    @abc.abstractmethod
    def finish_warpgroup_multiply_add(self, c: Sequence[Sequence[Value]]) -> list[list[Value]]:
        """Waits for all that ``queue_warpgroup_multiply_add`` queued; returns its last result for any use."""

    @abc.abstractmethod
    def warpgroup_multiply_add_bfloat16(
        self,
        columns: int,
        c: Sequence[Sequence[Value]] | None,
        a: Sequence[Sequence[Sequence[Value]]],
        b: Value,
        meanwhile: Callable[[], Sequence[Value]] = list,
    ) -> tuple[list[list[Value]], list[Value]]:
        """Returns ``C + A @ B`` for several C, summed over several B in shared memory (``wgmma.m64nNk16``).

        A and B are bfloat16, C ``f32``. Needs compute capability 9.0. Each warp has A ``[16, 16]`` and C
        ``[16, columns]`` of its own. A is that of ``matrix_multiply_add_bfloat16``; the registers ``4 t
        ..+3`` of C are its C for columns ``8 t ..+7``. The warps of a warpgroup have the same B. It is in
        rows of 128 bytes as ``copy_box`` leaves them, a row for each column; K lies along the row. Each of
        the other B starts 32 bytes after the one before, in the same rows.

        Args:
          columns: Number of columns of B, a multiple of 8 up to 256.
          c: Registers of each C, or None for zeros.
          a: For each B, the registers of A for each C.
          b: Address of the first B, a multiple of 32, in a row 0 whose address is a multiple of 1024.
          meanwhile: Emits instructions, which run while the matrix unit multiplies; returns their results.
            They do not use ``c``.

        Returns:
          The sums, and the results of ``meanwhile``.
        """

    @abc.abstractmethod
    def publish_operands(self) -> None:
        """Lets products of warpgroups in other lanes see, after a barrier, what this lane stored in shared
        memory, or copied and waited for."""
