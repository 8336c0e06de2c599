"""Turns the digits of planes into operands A of the matrix unit: bfloat16 that hold codes exactly.

A transposing load gives a lane words with two channels in their halves. A half has two bytes, which belong
to two rows of A; a byte has the digits of four outputs, called *positions*. A warp multiplies two of them: a
warpgroup has positions 0 and 2, the other one positions 1 and 3. The digits of the former move to the places
of the latter (``Moves``), so both have the same program, where position 1 is called low and position 3 high.

The digits of a position in up to three planes are a code ``c`` of 6 bits. The byte ``2 c + 1`` below the byte
0x43 is the bfloat16 ``128 + 2 c + 1``, and one addition gives ``2 c + 1 - 4**planes``, twice the difference
between the code and its midpoint. At level 4 that of three planes times 4, plus the last digit, is such a
difference for 8 bits: an odd number below 256, which is a bfloat16, too. So nothing is rounded.
"""

import dataclasses

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import BLOCK_CHANNELS, PRODUCTS, TILE_ROW_BYTES, Geometry

POSITIONS = 2
"""Number of positions that a warp multiplies."""

EXPONENT, LAST_EXPONENT = 0x43434343, 0x41414141
"""Four high bytes of a bfloat16 from 128 to 255 with unit 1, and of one from 8 to 15 with unit 1/16."""

EVEN_ROWS, ODD_ROWS = 0x4240, 0x4341
"""Selectors of ``permute_bytes``: bytes of either row of A in both halves of a word, below an exponent."""

ONE, FOUR = 0x3F803F80, 0x40804080
"""Pairs of bfloat16."""

MINUS_780 = 0xC443C443
"""Pair of bfloat16: ``4 (128 + 2 c + 1) - 780 + (8 + 2 d + 1) = 2 (4 c + d) + 1 - 4**4``. No step rounds."""

MINUS_ZERO = 0x80008000
"""Pair of the bfloat16 -0, which changes no number if it is added."""

MIDPOINTS = {1: 0xC304C304, 2: 0xC310C310, 3: 0xC340C340}
"""Pairs of the bfloat16 ``-(128 + 4**planes)``."""


@dataclasses.dataclass(frozen=True)
class Moves:
    """How the digits of a warp's positions come to the places of positions 1 and 3.

    Attributes:
      factor: 4 if the warp multiplies positions 0 and 2, else 1. A multiplication moves digits on the unit of
        floating-point numbers, which the program needs less than that of shifts.
      shift: 2 - log2(factor): the bits by which the second of two planes moves down, below the first.
    """

    factor: Value
    shift: Value

    @classmethod
    def of(cls, parity: Value) -> "Moves":
        """Returns the moves of a parity, 0 or 1, of the positions."""
        return cls(parity * -3 + 4, parity << 1)


@dataclasses.dataclass(frozen=True)
class Scales:
    """The scale of a row of A as the sum of two bfloat16, each in both halves of a word."""

    high: Value
    low: Value

    @classmethod
    def of(cls, isa: Instructions, scale: Value) -> "Scales":
        """Returns the parts of a float16 in ``f32``, whose 11 significant bits fit them."""
        high = isa.pack_bfloat16(scale, scale)
        low = scale - isa.bits_to_float(high & 0xFFFF0000)
        return cls(high, isa.pack_bfloat16(low, low))


def load_operands(
    isa: Instructions,
    g: Geometry,
    planes: Value,
    moves: Moves,
    block: int,
    scales: list[list[Scales]] | None = None,
) -> list[list[list[Value]]]:
    """Returns the operands A ``[product][position][4]`` of a block of channels of a unit.

    Args:
      isa, g: The instructions and sizes.
      planes: The lane's address of the unit's planes.
      moves: Moves of the warp's positions.
      block: Index of the block.
      scales: Scales ``[position][row]`` that multiply the operands, which are then rounded to bfloat16; None
        leaves exact integers.
    """
    first = planes + block * BLOCK_CHANNELS * TILE_ROW_BYTES
    # Behind the CTA's last unit the slot may be one that nothing has written. Its products are not used.
    words = [
        isa.load_matrices_transposed(first + f * g.plane_unit_bytes, unwritten=True) for f in range(g.level)
    ]
    matrices = [numbers(isa, [plane[m] for plane in words], moves) for m in range(2 * PRODUCTS)]
    if scales is not None:
        matrices = [
            [
                [scaled(isa, pair, scale) for pair, scale in zip(rows, of_position, strict=True)]
                for rows, of_position in zip(matrix, scales, strict=True)
            ]
            for matrix in matrices
        ]
    return [
        [[*matrices[2 * i][position], *matrices[2 * i + 1][position]] for position in range(POSITIONS)]
        for i in range(PRODUCTS)
    ]


def scaled(isa: Instructions, pair: Value, scale: Scales) -> Value:
    """Multiplies two bfloat16 by a scale. They are rounded once, besides the last bits of a small addend."""
    low = isa.multiply_add_bfloat16(pair, scale.low, isa.constant(MINUS_ZERO))
    return isa.multiply_add_bfloat16(pair, scale.high, low)


def numbers(isa: Instructions, planes: list[Value], moves: Moves) -> list[list[Value]]:
    """Returns pairs of bfloat16 ``2 code + 1 - 4**level`` from a word of each plane: ``[position][row]``."""
    joined = min(len(planes), 3)
    one, midpoint = isa.constant(ONE), isa.constant(MIDPOINTS[joined])
    pairs = [two_rows(isa, byte, EXPONENT) for byte in joined_digits(isa, planes[:joined], moves)]
    if len(planes) == joined:
        return [[isa.multiply_add_bfloat16(pair, one, midpoint) for pair in rows] for rows in pairs]
    four, rest = isa.constant(FOUR), isa.constant(MINUS_780)
    last = [two_rows(isa, byte, LAST_EXPONENT) for byte in last_digits(isa, planes[3], moves)]
    return [
        [
            isa.multiply_add_bfloat16(isa.multiply_add_bfloat16(pair, four, rest), one, digit)
            for pair, digit in zip(rows, digits, strict=True)
        ]
        for rows, digits in zip(pairs, last, strict=True)
    ]


def two_rows(isa: Instructions, byte: Value, exponent: int) -> list[Value]:
    """Puts an exponent above the bytes of a word: pairs of bfloat16 for both rows of A."""
    return [isa.permute_bytes(byte, isa.constant(exponent), rows) for rows in (EVEN_ROWS, ODD_ROWS)]


def joined_digits(isa: Instructions, planes: list[Value], moves: Moves) -> list[Value]:
    """Returns words with the bytes ``2 c + 1`` of the low and the high position of up to three planes.

    Digits of the low position are in bits 2 and 3 of a byte, those of the high position in bits 6 and 7.
    """
    first, ones = planes[0] * moves.factor, isa.constant(0x01010101)
    if len(planes) == 1:
        return [isa.select_bits(0x06060606, first >> shift, ones) for shift in (1, 5)]
    pairs = isa.select_bits(0xCCCCCCCC, first, planes[1] >> moves.shift)  # four bits of each position
    if len(planes) == 2:
        return [isa.select_bits(0x1E1E1E1E, word, ones) for word in (pairs << 1, pairs >> 3)]
    # Each digit of the third plane has a 1 below it.
    third = isa.select_bits(0xCCCCCCCC, planes[2] * moves.factor, isa.constant(0x22222222))
    return [
        isa.select_bits(0x78787878, pairs << 3, third >> 1),
        isa.select_bits(0x78787878, pairs >> 1, third >> 5),
    ]


def last_digits(isa: Instructions, plane: Value, moves: Moves) -> list[Value]:
    """Returns words with the bytes ``16 (2 d + 1)`` of the low and the high position of the fourth plane."""
    moved, ones = plane * moves.factor, isa.constant(0x10101010)
    return [isa.select_bits(0x60606060, word, ones) for word in (moved << 3, moved >> 1)]
