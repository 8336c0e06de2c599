"""The stored format and the graded product once more, in NumPy and float64, from their description alone."""

import numpy as np


def digits(weight) -> np.ndarray:
    """int64 ``[P, in_features, out_features]``: every digit, found word by word and bit by bit."""
    n = np.arange(weight.out_features)
    tile, n = n // 512, n % 512
    chunk, lane, inner = n // 128, n // 4 % 32, n % 4
    row, column = lane // 4, lane % 4
    word = 32 * tile + 4 * row + 2 * (chunk // 2) + column // 2
    digit = 4 * (2 * (column % 2) + inner % 2) + 2 * (chunk % 2) + inner // 2
    planes = np.asarray(weight.planes).astype(np.int64)[:, : weight.in_features]
    return planes[:, :, word] // 4**digit % 4


def dequantize(weight, level) -> np.ndarray:
    """float64 ``[in_features, out_features]``: the weight at ``level``, an int or one per channel."""
    level = np.broadcast_to(level, weight.in_features)[:, None]
    value = np.zeros((weight.in_features, weight.out_features))
    for f, digit in enumerate(digits(weight)):
        value += np.where(f < level, digit / 4.0**f, 0)
    value = np.where(level > 0, value + 0.5 * 4.0 ** (1 - level) - 2, 0)
    gains = (
        np.ones(weight.num_planes) if weight.gains is None else np.asarray(weight.gains).astype(np.float64)
    )
    return value * scale_of_each_weight(weight) * np.append(1, gains)[level]


def scale_of_each_weight(weight) -> np.ndarray:
    """float64 ``[in_features, out_features]``."""
    scales = np.asarray(weight.scales).astype(np.float64)[:, : weight.out_features]
    return scales[np.arange(weight.in_features) // 128]


def levels(x, thresholds) -> np.ndarray:
    """int ``[rows, K]`` for ``x [rows, K]`` and ``thresholds [P]`` or ``[rows, P]``."""
    x, thresholds = np.asarray(x).astype(np.float64), np.asarray(thresholds).astype(np.float64)
    thresholds = np.broadcast_to(thresholds, (len(x), thresholds.shape[-1]))
    return (np.abs(x)[:, :, None] >= thresholds[:, None]).sum(-1)


def graded_matvec(x, weight, thresholds) -> tuple[np.ndarray, np.ndarray]:
    """``(y [rows, N], realised bits [rows])`` in float64."""
    x = np.asarray(x).astype(np.float64)
    level = levels(x, thresholds)
    y = np.stack([row @ dequantize(weight, row_level) for row, row_level in zip(x, level, strict=True)])
    return y, 2.0 * level.mean(axis=1)
