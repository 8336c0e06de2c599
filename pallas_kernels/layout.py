"""The storage layout of nested codes: constants, padding, and the order of outputs inside a tile.

One 8-bit code is four 2-bit *digits*, most significant first. Digit ``f`` of every weight lives in
*plane* ``f``: ``planes[f, k, :]`` holds the digits of all outputs of input channel ``k``, 16 digits
to a 32-bit word, so that one channel's plane is one contiguous row and can be read, or skipped, alone.

Along the outputs a row is cut into *tiles* of 512 outputs = 32 words = 128 bytes. Inside a tile the
outputs are permuted so that the GPU kernel's matrix instruction delivers every lane 4 consecutive
outputs without a shuffle. The permutation is fixed, and is the business of this file alone.
"""

import numpy as np

GROUP = 128
"""Input channels that share one scale per output (the quantization group runs along K)."""

DIGIT_BITS = 2
"""Bits of one digit, hence of one plane and of one level step."""

MAX_PLANES = 4
"""Planes of a full 8-bit code."""

WORD_DIGITS = 16
"""Digits in one 32-bit word of a plane."""

TILE = 512
"""Outputs in one tile, the unit that N is padded to."""

TILE_WORDS = TILE // WORD_DIGITS
"""32-bit words of one input channel in one tile of one plane."""


def round_up(size: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


def padded_shape(in_features: int, out_features: int) -> tuple[int, int]:
    """Stored ``(K, N)`` of a logical ``(in_features, out_features)``: whole slices, whole tiles."""
    return round_up(in_features, GROUP), round_up(out_features, TILE)


def _tile_positions() -> np.ndarray:
    """int32 [512]: position ``word * 16 + digit_in_word`` of each output of a tile.

    Derived from the register layout of ``mma.sync.m16n8k32`` (PTX ISA, "Matrix fragments for
    mma.m16n8k32"): lane ``4 * row + column`` of a warp holds, after the multiply, outputs whose
    packed words were loaded by rows ``row`` of the A fragment. Output ``n = 128 * chunk + 4 * lane +
    inner`` is what lane ``lane`` stores as element ``inner`` of its 16-byte store number ``chunk``.
    Digit ``d`` of a word is its bits ``2 * d`` and ``2 * d + 1``.
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
"""int32 [512]: where output ``n`` of a tile is stored, as ``word * 16 + digit_in_word``."""

TILE_OUTPUTS = np.argsort(TILE_POSITIONS).astype(np.int32)
"""int32 [512]: which output is stored at each position (the inverse permutation)."""


def digit_major_positions(outputs: int) -> np.ndarray:
    """int32 ``[outputs]``: where each output of a row lies once its words are unpacked digit by digit.

    Unpacking one digit of *all* words of a row before the next digit keeps the words in vector
    registers. It yields the outputs in the order ``[16, words]``; ``unpacked.reshape(-1)[positions]``
    puts them in logical order. ``outputs`` is the stored N, a multiple of the tile.
    """
    words = outputs // WORD_DIGITS
    tile, position = np.divmod(np.arange(outputs), TILE)
    word, digit = np.divmod(TILE_POSITIONS[position], WORD_DIGITS)
    return (digit * words + tile * TILE_WORDS + word).astype(np.int32)
