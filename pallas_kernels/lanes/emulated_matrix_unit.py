"""The emulator's matrix unit: multiplies matrices that are spread over the registers of a warp."""

import abc

import ml_dtypes
import numpy as np

from pallas_kernels.lanes.emulated_memory import SharedMemory
from pallas_kernels.lanes.emulated_registers import LaneValue
from pallas_kernels.lanes.instructions import LANES, Instructions

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


class MatrixUnit(Instructions):
    """The instructions that multiply matrices, for all threads of an emulated grid.

    Attributes:
      total: Number of threads.
      shared: Shared memory of all CTAs.
    """

    total: int
    shared: SharedMemory

    @abc.abstractmethod
    def _warps(self, instruction: str) -> np.ndarray:
        """Returns the indices of the active warps; raises if only some lanes of a warp are active."""

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

    def warpgroup_multiply_add(self, c, a, b, meanwhile=list):
        columns = 2 * len(c[0])
        threads = (self._warps("warpgroup_multiply_add")[:, None] * LANES + np.arange(LANES)).reshape(-1)
        rows = np.zeros((self.total, columns // 16, 4), np.uint32)
        for i in range(columns // 16):
            address = b.data[threads].astype(np.int64) + 16 * (threads % LANES + LANES * i)
            rows[threads, i] = self.shared.read(threads, address, 4)
        # Row 16 t + 8 j + n of the warp has the elements [16 j ..+15, 8 t + n]; lane 4 n + column 4 of them.
        tiles = rows.reshape(-1, LANES, columns // 16, 4).swapaxes(1, 2).reshape(-1, columns // 8, 2, 8, 4)
        results = []
        for sums, registers in zip(c, a, strict=True):
            out = []
            for t in range(columns // 8):
                operand = [
                    LaneValue(np.ascontiguousarray(tiles[:, t, j]).reshape(-1).view(np.int32), "i32")
                    for j in range(2)
                ]
                out += self.matrix_multiply_add(sums[4 * t :][:4], registers, operand)
            results.append(out)
        return results, list(meanwhile())

    def publish_operands(self):
        pass
