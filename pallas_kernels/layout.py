"""The storage layout of nested codes: constants, padding, and the order of the outputs inside a tile.

An 8-bit code consists of four 2-bit *digits*, the most significant first. *Plane* ``f`` stores digit ``f``
of every weight. ``planes[f, k, :]`` is the row of input channel ``k``: the digits of all its outputs, 16 in
each 32-bit word. A row is contiguous, so it can be read or skipped alone.

A row is cut into *tiles* of 512 outputs = 32 words = 128 bytes. The outputs are permuted inside each tile, so
that the GPU kernel's matrix instruction gives every lane 4 consecutive outputs without a shuffle. Number the
words of a tile ``4 row + 2 half + pair``, with ``row`` in 0..7 and ``half`` and ``pair`` in 0..1. The bits
``8 b + 2 p`` and ``8 b + 2 p + 1`` of a word, with ``b`` and ``p`` in 0..3, are the digit of output

    ``256 half + 128 (p // 2) + 16 row + 8 pair + 4 (b // 2) + 2 (p % 2) + b % 2``.
"""

import numpy as np

GROUP = 128
"""Number of consecutive input channels that share one scale for each output."""

DIGIT_BITS = 2
"""Bits of a digit, which each level adds."""

MAX_PLANES = 4
"""Number of planes of an 8-bit code."""

WORD_DIGITS = 16
"""Number of digits in a 32-bit word."""

TILE = 512
"""Number of outputs in a tile. N is padded to whole tiles."""

TILE_WORDS = TILE // WORD_DIGITS
"""Number of 32-bit words that a row has in one tile."""


def round_up(size: int, multiple: int) -> int:
    """Returns the least multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


def padded_shape(in_features: int, out_features: int) -> tuple[int, int]:
    """Returns the stored ``(K, N)``: ``in_features`` in whole groups, ``out_features`` in whole tiles."""
    return round_up(in_features, GROUP), round_up(out_features, TILE)


def _tile_positions() -> np.ndarray:
    """Returns int32 ``[512]``: position ``word * 16 + digit_in_word`` of each output of a tile.

    The order follows from the register layout of ``mma.sync.m16n8k32`` (PTX ISA, "Matrix fragments for
    mma.m16n8k32"). After the multiplication, lane ``4 * row + column`` of a warp holds the outputs of the
    words that rows ``row`` and ``row + 8`` of the operand A contained. Output ``n = 128 * chunk + 4 * lane +
    inner`` is element ``inner`` of the 16-byte store number ``chunk`` of lane ``lane``. Digit ``d`` of a word
    is its bits ``2 * d`` and ``2 * d + 1``.
    """
    n = np.arange(TILE)
    chunk, lane, inner = n >> 7, (n >> 2) & 31, n & 3
    row, column = lane >> 2, lane & 3
    half = chunk >> 1
    digit_in_byte = ((chunk & 1) << 1) | (inner >> 1)
    byte = 2 * (column & 1) + (inner & 1)
    word = 4 * row + 2 * half + (column >> 1)
    return (word * WORD_DIGITS + 4 * byte + digit_in_byte).astype(np.int32)


TILE_POSITIONS = _tile_positions()
"""int32 ``[512]``: position of output ``n`` of a tile, ``word * 16 + digit_in_word``."""

TILE_OUTPUTS = np.argsort(TILE_POSITIONS).astype(np.int32)
"""int32 ``[512]``: output at each position of a tile, the inverse permutation."""


def digit_major_positions(outputs: int) -> np.ndarray:
    """Returns int32 ``[outputs]``: position of each output in a row that is unpacked digit by digit.

    Unpacking the same digit of all words before the next digit keeps the words in vector registers. The
    outputs then come in the order ``[16, words]``; ``unpacked.reshape(-1)[positions]`` puts them in logical
    order.

    Args:
      outputs: Stored N, a multiple of the tile.
    """
    words = outputs // WORD_DIGITS
    tile, position = np.divmod(np.arange(outputs), TILE)
    word, digit = np.divmod(TILE_POSITIONS[position], WORD_DIGITS)
    return (digit * words + tile * TILE_WORDS + word).astype(np.int32)
