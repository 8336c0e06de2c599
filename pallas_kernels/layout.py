"""The storage layout of nested codes: constants, padding, and the order of the outputs inside a tile.

An 8-bit code consists of four 2-bit *digits*, the most significant first. *Plane* ``f`` stores digit ``f``
of every weight. ``planes[f, k, :]`` is the row of input channel ``k``: the digits of all its outputs, 16 in
each 32-bit word. A row is contiguous, so it can be read or skipped alone.

A row is cut into *tiles* of 512 outputs = 32 words = 128 bytes. A tile has 8 *pieces* of 64 outputs = 16
bytes. The last tile of a row may have fewer pieces, so that narrow layers store little padding. The outputs
are permuted inside each tile, so that the GPU kernel's matrix instruction gives every lane 4 consecutive
outputs without a shuffle. Number the words of a tile ``4 piece + 2 half + pair``, with ``half`` and ``pair``
in 0..1. In a tile of ``pieces`` pieces, the bits ``8 b + 2 p`` and ``8 b + 2 p + 1`` of a word, with ``b``
and ``p`` in 0..3, are the digit of output

    ``16 pieces (2 half + p // 2) + 16 piece + 8 pair + 4 (b // 2) + 2 (p % 2) + b % 2``.
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

PIECE = 64
"""Number of outputs in a piece. Its digits are 16 bytes, which a lane of the GPU kernel copies at once."""

TILE_PIECES = 8
"""Number of pieces in a whole tile."""

TILE = TILE_PIECES * PIECE
"""Number of outputs in a whole tile, 512."""

TILE_WORDS = TILE // WORD_DIGITS
"""Number of 32-bit words that a row has in a whole tile."""

WHOLE_TILES_SHARE = 16
"""Pieces are padded to whole tiles if this adds at most ``1 / WHOLE_TILES_SHARE`` of them."""


def round_up(size: int, multiple: int) -> int:
    """Returns the least multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


def padded_shape(in_features: int, out_features: int) -> tuple[int, int]:
    """Returns the stored ``(K, N)``: ``in_features`` in whole groups, ``out_features`` in pieces or tiles.

    N is padded to whole pieces. If whole tiles are at most a sixteenth more, it is padded to whole tiles:
    rows of whole tiles start at multiples of 128 bytes, the cache line of a GPU.
    """
    pieces = round_up(out_features, PIECE) // PIECE
    whole = round_up(pieces, TILE_PIECES)
    if WHOLE_TILES_SHARE * (whole - pieces) <= pieces:
        pieces = whole
    return round_up(in_features, GROUP), PIECE * pieces


def last_tile_pieces(outputs: int) -> int:
    """Returns the number of pieces in the last tile of rows with ``outputs`` stored outputs, 1 to 8."""
    return (outputs // PIECE - 1) % TILE_PIECES + 1


def tile_positions(pieces: int = TILE_PIECES) -> np.ndarray:
    """Returns int32 ``[64 * pieces]``: position ``word * 16 + digit_in_word`` of each output of a tile.

    The order follows from the register layout of ``mma.sync.m16n8k32`` (PTX ISA, "Matrix fragments for
    mma.m16n8k32"). After the multiplication, lane ``4 * piece + column`` of a warp holds the outputs of the
    words that rows ``piece`` and ``piece + 8`` of the operand A contained. Output ``n = 16 * pieces * chunk +
    4 * lane + inner``, with ``chunk`` and ``inner`` in 0..3 and ``lane`` in ``0..4 * pieces - 1``, is element
    ``inner`` of the 16-byte store number ``chunk`` of lane ``lane``. Digit ``d`` of a word is its bits
    ``2 * d`` and ``2 * d + 1``.

    Args:
      pieces: Number of pieces in the tile.
    """
    chunk, in_chunk = np.divmod(np.arange(pieces * PIECE), 16 * pieces)
    lane, inner = np.divmod(in_chunk, 4)
    piece, column = lane >> 2, lane & 3
    half = chunk >> 1
    digit_in_byte = ((chunk & 1) << 1) | (inner >> 1)
    byte = 2 * (column & 1) + (inner & 1)
    word = 4 * piece + 2 * half + (column >> 1)
    return (word * WORD_DIGITS + 4 * byte + digit_in_byte).astype(np.int32)


def row_positions(outputs: int) -> np.ndarray:
    """Returns int32 ``[outputs]``: position ``word * 16 + digit_in_word`` of each output in a row.

    Args:
      outputs: Stored N, a multiple of the piece.
    """
    last = last_tile_pieces(outputs) * PIECE
    whole = np.arange(0, outputs - last, TILE, dtype=np.int32)[:, None] + tile_positions()
    return np.append(whole, outputs - last + tile_positions(last // PIECE)).astype(np.int32)


def digit_major_positions(outputs: int) -> np.ndarray:
    """Returns int32 ``[outputs]``: position of each output in a row that is unpacked digit by digit.

    Unpacking the same digit of all words before the next digit keeps the words in vector registers. The
    outputs then come in the order ``[16, words]``; ``unpacked.reshape(-1)[positions]`` puts them in logical
    order.

    Args:
      outputs: Stored N, a multiple of the piece.
    """
    word, digit = np.divmod(row_positions(outputs), WORD_DIGITS)
    return (digit * (outputs // WORD_DIGITS) + word).astype(np.int32)
