"""The emulator's matrix unit: multiplies matrices that are spread over the registers of a warp."""

import numpy as np

from pallas_kernels.lanes.instructions import LANES

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
