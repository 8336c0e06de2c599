"""The stored format and the graded matvec in NumPy and float64, written from the format's description alone.

All implementations are compared with this oracle: reference, XLA, the emulated GPU kernels and the kernels on
a GPU. It reads the fields of a ``NestedWeight`` and imports nothing else of ``pallas_kernels``, so a mistake
in ``layout`` or ``codes`` cannot cancel out.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from pallas_kernels import NestedWeight

GROUP = 128
"""Number of consecutive input channels that share one scale for each output."""

TILE = 512
"""Number of outputs in a tile, inside which outputs are permuted. The last tile may be narrower."""

PIECE = 64
"""Number of outputs in a piece: 16 bytes of a row in a tile."""

WORD_OUTPUTS = 16
"""Number of outputs whose 2-bit digits share a 32-bit word."""

UNIFORM_VARIANCE = 4 / 3
"""Mean square of a value that is uniform on (-2, 2), as a random code is before it is scaled."""


def padded_shape(in_features: int, out_features: int) -> tuple[int, int]:
    """Returns the stored ``(K, N)``: whole groups of input channels, whole pieces or tiles of outputs.

    Whole tiles are stored if their padding is at most a sixteenth of the pieces.
    """
    n, tiles = -(-out_features // PIECE) * PIECE, -(-out_features // TILE) * TILE
    return -(-in_features // GROUP) * GROUP, tiles if tiles - n <= n / 16 else n


def _digit_positions(pieces: int) -> np.ndarray:
    """Returns int ``[64 pieces, 2]``: the word in the tile, and the digit in the word, of each output.

    The words are numbered ``4 piece + 2 half + pair``. Digit ``4 byte + position`` of a word, its bits
    ``8 byte + 2 position`` and the next, belongs to output

        ``16 pieces (2 half + position // 2) + 16 piece + 8 pair + 4 (byte // 2) + 2 (position % 2)``
        ``+ byte % 2``.
    """
    positions = np.full((PIECE * pieces, 2), -1)
    for piece in range(pieces):
        for half in range(2):
            for pair in range(2):
                for byte in range(4):
                    for position in range(4):
                        output = 16 * pieces * (2 * half + position // 2) + 16 * piece + 8 * pair
                        output += 4 * (byte // 2) + 2 * (position % 2) + byte % 2
                        positions[output] = 4 * piece + 2 * half + pair, 4 * byte + position
    return positions


def _row_positions(outputs: int) -> np.ndarray:
    """Returns int ``[outputs, 2]``: for each output of a stored row, its word and its digit in the word."""
    tiles = []
    for start in range(0, outputs, TILE):
        positions = _digit_positions(min(TILE, outputs - start) // PIECE)
        tiles.append(positions + np.asarray([start // WORD_OUTPUTS, 0]))
    return np.concatenate(tiles)


def digits(weight: NestedWeight) -> Iterator[np.ndarray]:
    """Yields uint8 ``[in_features, out_features]`` for each plane, the most significant digit first."""
    word, digit = _row_positions(weight.scales.shape[1])[: weight.out_features].T
    for plane in np.asarray(weight.planes):
        yield (plane[: weight.in_features, word] >> (2 * digit).astype(np.uint32) & 3).astype(np.uint8)


def _scales(weight: NestedWeight) -> np.ndarray:
    """Returns float64 ``[groups, out_features]``."""
    return np.asarray(weight.scales).astype(np.float64)[:, : weight.out_features]


def scale_of_each_weight(weight: NestedWeight) -> np.ndarray:
    """Returns float64 ``[in_features, out_features]``."""
    return _scales(weight)[np.arange(weight.in_features) // GROUP]


def _level_gains(weight: NestedWeight) -> np.ndarray:
    """Returns float64 ``[P + 1]``, the gains of levels 0 to P."""
    gains = np.ones(len(weight.planes)) if weight.level_gains is None else np.asarray(weight.level_gains)
    return np.append(1, gains.astype(np.float64))


def weights_by_level(weight: NestedWeight) -> Iterator[np.ndarray]:
    """Yields the weights at each level from 0 to P, float64 ``[in_features, out_features]``."""
    scale, gains = scale_of_each_weight(weight), _level_gains(weight)
    total = np.zeros(scale.shape)
    yield total
    for level, digit in enumerate(digits(weight), start=1):
        total = total + digit / 4.0 ** (level - 1)
        yield gains[level] * scale * (total + 0.5 * 4.0 ** (1 - level) - 2)


def dequantize(weight: NestedWeight, level: int | np.ndarray) -> np.ndarray:
    """Returns float64 ``[in_features, out_features]`` at ``level``: one level, or one for each channel."""
    level = np.broadcast_to(level, weight.in_features)[:, None]
    value = np.zeros((weight.in_features, weight.out_features))
    for i, w in enumerate(weights_by_level(weight)):
        value = np.where(level == i, w, value)
    return value


def levels(x: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Returns int ``[rows, K]``; x is ``[rows, K]``, thresholds ``[P]`` or ``[rows, P]``. NaN reaches all."""
    x, thresholds = np.asarray(x).astype(np.float64), np.asarray(thresholds).astype(np.float64)
    thresholds = np.broadcast_to(thresholds, (len(x), thresholds.shape[-1]))
    return (~(np.abs(x)[:, :, None] < thresholds[:, None])).sum(-1)


@dataclasses.dataclass(frozen=True)
class Exact:
    """A graded matvec in float64."""

    y: np.ndarray
    """Product, ``[rows, out_features]``."""
    spread: np.ndarray
    """Standard deviation of y for random codes, ``[rows, out_features]``. It exceeds ``|y|`` where the terms
    of y happen to cancel or the weights happen to be small."""
    bits: np.ndarray
    """Mean bits read per weight, ``[rows]``."""


def graded_matvec(x: np.ndarray, weight: NestedWeight, thresholds: np.ndarray) -> Exact:
    """Multiplies ``x [rows, K]`` by the weight, each channel read at its level (see ``levels``)."""
    x, level = np.asarray(x).astype(np.float64), levels(x, thresholds)
    gains, starts = _level_gains(weight), np.arange(0, weight.in_features, GROUP)
    variances = UNIFORM_VARIANCE * _scales(weight)[: len(starts)] ** 2
    y, squares = np.zeros((2, len(x), weight.out_features))
    for i, w in enumerate(weights_by_level(weight)):
        read = np.where(level == i, x, 0)
        y += read @ w
        if i:  # The channels of a group have the same variance.
            squares += gains[i] ** 2 * np.add.reduceat(read**2, starts, axis=1) @ variances
    return Exact(y, np.sqrt(squares), 2.0 * level.mean(1))
