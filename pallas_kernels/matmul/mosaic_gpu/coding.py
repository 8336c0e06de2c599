"""The program that turns activations into 16-bit codes, and lays them out as operands of the matrix unit.

The codes ``q`` of an activation row in a group are the nearest integers to ``x / (CODE_UNIT 2**e)``, with
the power of two that gives the largest magnitude a code of ``PEAK_CODE / 2`` to ``PEAK_CODE``. A code is 256
times a high byte plus a low byte, both signed. The sums ``sum((c - m) byte)`` over the high or the low bytes
of a group, with ``c`` the weight's codes and ``m`` their midpoint, are below ``2**22``. So the matrix unit
starts each of its integer sums with

    ``ZERO - m sum(byte)``,    with ``ZERO`` the bits of the float32 ``1.5 * 2**23``,

and ends with the bits of the float32 ``1.5 * 2**23 + sum((c - m) byte)``: no conversion is necessary. Because
``2**e`` is a power of two, two instructions with the factors of the record turn a sum of high and a sum of
low bytes into ``2**e sum((c - m) q)``, with one rounding.
"""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.codes import DIGIT_MEAN
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.lanes.rows import unpack_bfloat16
from pallas_kernels.matmul.mosaic_gpu.geometry import RECORD_BYTES, Geometry
from pallas_kernels.matvec.mosaic_gpu.listing import (
    LOW_SIGN,
    PEAK_CODE,
    ROUNDED_ZERO,
    ROUNDING,
    SMALLEST_PEAK_BITS,
)

CODING_THREADS = 128
"""Number of threads in a CTA. Each warp codes one activation row in one group."""

EXPONENT_MASK = 0x7F800000
"""Bits of the exponent of a float32, and the bits of Inf."""

NAN_BITS = 0x7FC00000

CODE_BITS = 14
"""``2**e`` is ``2**CODE_BITS`` times smaller than the largest power of two that the peak reaches."""

LARGEST_BFLOAT16 = 255 / 128
"""Largest bfloat16 below 2."""

CODE_UNIT = LARGEST_BFLOAT16 * 2**CODE_BITS / PEAK_CODE
"""Unit of the codes in units of ``2**e``, slightly above 1. The caller multiplies the product by it."""


def low_offset(g: Geometry) -> int:
    """Returns the bytes between the high and the low bytes of a row's codes, neighbouring columns of B."""
    return 16 if g.warpgroups else 4 * 16


ZERO = 0x4B400000
"""Bits of ``ZERO_FLOAT``."""

ZERO_FLOAT = 1.5 * 2.0**23
"""float32 to which integers below ``2**22`` can be added in its bits."""


@dataclasses.dataclass(frozen=True)
class CodingRefs:
    """Arrays in global memory. The program has no shared memory.

    Attributes:
      x: bfloat16 ``[rows, in_features]``.
      codes, records: Outputs, see ``lane_context.Refs``.
      shared: Not used.
    """

    x: Any
    codes: Any
    records: Any
    shared: Any


def coding_blocks(g: Geometry) -> int:
    """Returns the number of CTAs."""
    return g.row_batches * g.rows_per_cta * g.groups // (CODING_THREADS // LANES)


def coding_program(isa: Instructions, g: Geometry, refs: CodingRefs) -> None:
    """Codes one activation row in one group in each warp."""
    thread = isa.thread_index()
    lane = thread & (LANES - 1)
    item = isa.block_index() * (CODING_THREADS // LANES) + (thread >> 5)
    row, group = item // g.groups, item % g.groups
    codes = code(isa, load_words(isa, g, refs.x, lane, row, group), g.level)

    batch, row = row // g.rows_per_cta, row % g.rows_per_cta
    blob = batch * g.groups + group
    operands = isa.global_address(refs.codes) + isa.widen(blob * g.group_code_bytes)
    operands = operands + isa.widen(operand_offset(g, lane, row))
    isa.store_global(operands, [codes.high])
    isa.store_global(operands + low_offset(g), [codes.low])
    with isa.when(lane.equals(0)):
        records = isa.global_address(refs.records) + isa.widen(blob * (RECORD_BYTES * g.rows_per_cta))
        isa.store_global(records + isa.widen(row << 4), codes.starts * 2)
        isa.store_global(records + isa.widen((row << 4) + 16 * g.rows_per_cta), codes.factors)


def load_words(
    isa: Instructions, g: Geometry, ref: Any, lane: Value, row: Value, group: Value
) -> list[Value]:
    """Loads the lane's four activations of a row in a group, two bfloat16 in a word; zeros in padding.

    Lane ``8 m + 4 j + c`` has channels ``32 m + 16 j + 2 c`` and ``+ 1``, and those 8 channels later, which
    are the bytes of one register of B.
    """
    channel = group * layout.GROUP + ((lane >> 2) << 4) + ((lane & 3) << 1)
    first, words = isa.global_address(ref), []
    for offset in (0, 8):
        halves = []
        for half in range(1 if g.in_features % 2 == 0 else 2):
            exists = isa.constant(True, "bool") if g.rows % g.rows_per_cta == 0 else row < g.rows
            if g.in_features % layout.GROUP:
                exists = exists & (channel + (offset + half) < g.in_features)
            address = first + isa.widen((row * g.in_features + channel + (offset + half)) << 1)
            address = isa.select(exists, address, first)
            loaded = isa.load_global(address)[0] if g.in_features % 2 == 0 else isa.load_global_16(address)
            halves.append(isa.select(exists, loaded, isa.constant(0)))
        words.append(halves[0] if len(halves) == 1 else halves[0] | (halves[1] << 16))
    return words


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes of a lane's four activations, and the record of their row in the group."""

    high: Value
    low: Value
    starts: list[Value]
    """Words that the sums with high and with low bytes start with."""
    factors: list[Value]
    """``256 * 2**e``, ``-257 * 2**e * ZERO_FLOAT``, ``2**e``, 0, f32; NaN if an activation is NaN or Inf."""


def code(isa: Instructions, words: list[Value], level: int) -> Codes:
    """Codes the activations of a warp, which are a row in a group."""
    x = [number for word in words for number in unpack_bfloat16(isa, word)]
    peak = isa.float_to_bits(isa.absolute(x[0]))
    for number in x[1:]:
        peak = isa.maximum(peak, isa.float_to_bits(isa.absolute(number)))
    peak = isa.maximum(isa.reduce_max(peak), isa.constant(SMALLEST_PEAK_BITS))
    power = (peak & EXPONENT_MASK) - (CODE_BITS << 23)
    inverse_unit = isa.bits_to_float(isa.constant(254 << 23) - power) * (1.0 / CODE_UNIT)
    power = isa.bits_to_float(isa.select(peak < EXPONENT_MASK, power, isa.constant(NAN_BITS)))
    rounding = isa.constant(ROUNDING, "f32")
    bits = [isa.float_to_bits(isa.multiply_add(number, inverse_unit, rounding)) for number in x]
    pairs = [isa.permute_bytes(bits[i], bits[i + 1], 0x5140) for i in (0, 2)]  # low, low, high, high
    total = bits[0] + bits[1] + bits[2] + bits[3] - 4 * ROUNDED_ZERO
    high = (bits[0] >> 8) + (bits[1] >> 8) + (bits[2] >> 8) + (bits[3] >> 8) - 4 * (ROUNDED_ZERO >> 8)
    return Codes(
        high=isa.permute_bytes(pairs[0], pairs[1], 0x7632),
        low=isa.permute_bytes(pairs[0], pairs[1], 0x5410) ^ (LOW_SIGN * 0x01010101),
        starts=starts(isa, level, isa.reduce_add(total), isa.reduce_add(high)),
        factors=[power * 256.0, power * (-257 * ZERO_FLOAT), power, isa.constant(0.0, "f32")],
    )


def operand_offset(g: Geometry, lane: Value, row: Value) -> Value:
    """Returns the offset in the codes of a group of the lane's high bytes of a row of the CTA.

    The low bytes lie ``low_offset`` bytes later. ``lane_context.Refs`` describes the order.
    """
    matrix, j, column = lane >> 3, (lane >> 2) & 1, lane & 3
    octet, half, n = row >> 3, (row >> 2) & 1, (row & 3) << 1
    if g.warpgroups:
        tile = (octet << 9) + (half << 8)
        return matrix * g.matrix_code_bytes + tile + (j << 7) + (n << 4) + (column << 2)
    operand = (octet << 5) + (n << 2) + column
    return matrix * g.matrix_code_bytes + (operand << 4) + (half << 3) + (j << 2)


def starts(isa: Instructions, level: int, total: Value, high: Value) -> list[Value]:
    """Returns the words that the sums with high and with low bytes start with, from the sums of x.

    Twice the midpoint is an integer. If half of the product with the high bytes is none, the rest, 128 low
    bytes, goes to the other sum.
    """
    twice_midpoint = round(2 * DIGIT_MEAN * sum(4 ** (3 - f) for f in range(level)))
    high_product = high * twice_midpoint
    start_high = half_of(high_product)
    rest = high_product - start_high * 2
    start_low = half_of((total - high * 256) * twice_midpoint) + rest * 128
    zero = isa.constant(ZERO)
    return [zero - start_high, zero - start_low]


def half_of(number: Value) -> Value:
    """Returns half of an integer, rounded down. Its magnitude is below ``2**30``."""
    return ((number + 2**30) >> 1) - 2**29
