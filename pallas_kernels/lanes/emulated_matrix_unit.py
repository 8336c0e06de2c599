"""The emulator's matrix unit: multiplies matrices that are spread over the registers of a warp."""

import abc
import contextlib
import dataclasses

import ml_dtypes
import numpy as np

from pallas_kernels.lanes.emulated_memory import EmulationError, SharedMemory
from pallas_kernels.lanes.emulated_registers import LaneValue
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.launch import WARPGROUP
from pallas_kernels.lanes.registers import Value

_OPERAND = ((0, 0), (1, 0), (0, 1), (1, 1))
"""``(i, j)`` of the registers of A: rows from ``8 i`` on, half ``j`` of the columns."""

_RESULT = ((0, 0), (0, 1), (1, 0), (1, 1))
"""``(i, j)`` of the registers of C: rows from ``8 i`` on, column ``j`` of the lane's pair."""


def multiply_fragments(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    """Multiplies ``A [16, 8 n] @ B [8 n, 8]`` in every warp, in float64.

    ``Instructions.matrix_multiply_add`` gives the layout.

    Args:
      a: Four registers of A, each ``[threads, n]``, where ``n`` elements share a register.
      b: Two registers of B, each ``[threads, n]``.

    Returns:
      Four registers of the product, float64 ``[threads]``.
    """
    threads, n = a[0].shape
    warps = threads // LANES
    left, right = np.empty((warps, 2, 8, 2, 4 * n)), np.empty((warps, 2, 4 * n, 8))
    for register, (i, j) in zip(a, _OPERAND, strict=True):
        left[:, i, :, j] = register.reshape(warps, 8, 4 * n)  # Four lanes hold a row.
    for j, register in enumerate(b):
        right[:, j] = register.reshape(warps, 8, 4 * n).swapaxes(1, 2)  # Four lanes hold a column.
    product = left.reshape(warps, 16, 8 * n) @ right.reshape(warps, 8 * n, 8)
    pairs = product.reshape(warps, 2, 8, 4, 2)
    return [pairs[:, i, :, :, j].reshape(-1) for i, j in _RESULT]


class QueuedSum(Value):
    """A register that the matrix unit is still writing. It has no contents that a program may use."""

    def __init__(self, kind):
        self.kind = kind

    @property
    def data(self):
        raise EmulationError("a sum of a queued product is used before finish_warpgroup_multiply_add")

    def binary(self, operation, other):
        return self.data


@dataclasses.dataclass
class QueuedProduct:
    """A product that the matrix unit has not computed yet.

    Attributes:
      mask: Threads that queued it.
      operands: Its arguments: C, A, the address of B.
      sums: What the program got instead of the sums.
    """

    mask: np.ndarray
    operands: tuple
    sums: list[list[QueuedSum]]


class MatrixUnit(Instructions):
    """The instructions that multiply matrices, for all threads of an emulated grid.

    Attributes:
      total: Number of threads.
      shared: Shared memory of all CTAs.
      masks: Stack of the active threads.
      queued: The product that was queued last, if it is not finished.
    """

    total: int
    shared: SharedMemory
    masks: list[np.ndarray]
    queued: QueuedProduct | None = None

    @abc.abstractmethod
    def _warps(self, instruction: str) -> np.ndarray:
        """Returns the indices of the active warps; raises if only some lanes of a warp are active."""

    @abc.abstractmethod
    def _whole(self, threads: int, instruction: str, unit: str) -> np.ndarray:
        """Returns which groups of ``threads`` threads are active; raises if only a part of one is."""

    def matrix_multiply_add(self, c, a, b):
        self._warps("matrix_multiply_add")
        product = multiply_fragments(
            [register.data.view(np.uint8).reshape(-1, 4) for register in a],
            [register.data.view(np.int8).reshape(-1, 4) for register in b],
        )
        # The product is exact: it is below 2**53.
        return [LaneValue(r.data + p.astype(np.int32), "i32") for r, p in zip(c, product, strict=True)]

    def matrix_multiply_add_bfloat16(self, c, a, b):
        self._warps("matrix_multiply_add_bfloat16")
        with np.errstate(all="ignore"):  # signalling NaNs among them
            product = multiply_fragments(
                *([register.data.view(ml_dtypes.bfloat16).reshape(-1, 2) for register in m] for m in (a, b))
            )
            return [LaneValue(r.data + p, "f32") for r, p in zip(c, product, strict=True)]

    def queue_warpgroup_multiply_add(self, c, a, b, offset):
        c = self._sums(c)
        sums = [[QueuedSum(register.kind) for register in matrix] for matrix in c]
        self.queued = QueuedProduct(self.masks[-1], (c, a, b + offset), sums)
        return sums

    def finish_warpgroup_multiply_add(self, c):
        return self._sums(c)

    def _sums(self, c):
        """Computes the queued product, and returns C, or the sums of that product if C stands for them.

        So the matrix unit reads B as late as it may.
        """
        queued, self.queued = self.queued, None
        if queued is None:
            return [list(registers) for registers in c]
        sums, a, b = queued.operands
        with self._as_active(queued.mask):
            sums = self._warpgroup_products(
                2 * len(sums[0]), sums, a, b, (128, 256), self.matrix_multiply_add
            )
        known = {
            id(stand_in): v
            for m, n in zip(queued.sums, sums, strict=True)
            for stand_in, v in zip(m, n, strict=True)
        }
        return [[known.get(id(register), register) for register in registers] for registers in c]

    @contextlib.contextmanager
    def _as_active(self, mask):
        """Runs the body with other active threads."""
        self.masks.append(mask)
        yield
        self.masks.pop()

    def warpgroup_multiply_add_bfloat16(self, columns, c, a, b, meanwhile=list):
        if c is None:
            c = [[LaneValue(np.zeros(self.total, np.float32), "f32")] * (columns // 2)] * len(a[0])
        # The matrix unit reads shared memory as late as it may, after what runs meanwhile.
        results = list(meanwhile())
        multiply = self.matrix_multiply_add_bfloat16
        for i, matrices in enumerate(a):
            c = self._warpgroup_products(columns, c, matrices, b + 32 * i, None, multiply)
        return c, results

    def _warpgroup_products(self, columns, c, a, b, distances, multiply):
        """Multiplies with one B in shared memory, 8 columns at a time as ``multiply`` does.

        Blocks of 8 columns and 16 bytes of K have these distances in bytes along K and N. Without distances
        B is in rows of 128 bytes as ``copy_box`` leaves them.
        """
        warpgroups = self._whole(WARPGROUP, "a product of warpgroups", "a warpgroup")
        threads = np.flatnonzero(np.repeat(warpgroups, WARPGROUP))
        results: list[list[LaneValue]] = [[] for _ in c]
        for t in range(columns // 8):
            # Row 8 j + n has the elements of half j of K for column n; lane 4 n + i has four bytes of them.
            rows = np.zeros((self.total, 4), np.uint32)
            half, column = threads // 8 % 2, threads % 8
            address = b.data[threads].astype(np.int64)
            if distances is None:
                address = address + 128 * (8 * t + column) + 16 * half
                address ^= (address >> 3) & 0x70
            else:
                address = address + distances[1] * t + distances[0] * half + 16 * column
            rows[threads] = self.shared.read_operands(threads, address, 4)
            halves = rows.reshape(-1, LANES, 4)[:, :16].reshape(-1, 2, 8, 4)
            operand = [
                LaneValue(np.ascontiguousarray(halves[:, j]).reshape(-1).view(np.int32), "i32")
                for j in range(2)
            ]
            for result, sums, registers in zip(results, c, a, strict=True):
                result += multiply(sums[4 * t :][:4], registers, operand)
        return results

    def publish_operands(self):
        self.shared.publish(self.masks[-1])
