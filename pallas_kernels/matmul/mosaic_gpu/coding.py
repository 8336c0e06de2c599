"""The program that turns activations into 16-bit codes, and lays them out as operands of the matrix unit.

The codes ``q`` of an activation row in a group are the nearest integers to ``x / unit``, where the largest
magnitude has the code ``PEAK_CODE``. A code is 256 times a high byte plus a low byte, both signed. The sums
``sum((c - m) byte)`` over the high or the low bytes of a group, with ``c`` the weight's codes and ``m`` their
midpoint, are below ``2**22``. So the matrix unit starts each of its integer sums with

    ``ZERO - m sum(byte)``,    with ``ZERO`` the bits of the float32 ``1.5 * 2**23``,

and ends with the bits of the float32 ``1.5 * 2**23 + sum((c - m) byte)``: no conversion is necessary.
"""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.codes import CODE_STEPS, DIGIT_MEAN
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import GROUP_MATRICES, MATRIX_CHANNELS, OCTET, Geometry
from pallas_kernels.matvec.mosaic_gpu.listing import (
    LOW_SIGN,
    PEAK_CODE,
    ROUNDED_ZERO,
    ROUNDING,
    SMALLEST_PEAK_BITS,
)

CODING_THREADS = 128
"""Number of threads in a CTA. Each warp codes one activation row in one group."""

ZERO = 0x4B400000
"""Bits of ``ZERO_FLOAT``."""

ZERO_FLOAT = 1.5 * 2.0**23
"""float32 to which integers below ``2**22`` can be added in its bits."""


@dataclasses.dataclass(frozen=True)
class CodingRefs:
    """Arrays in global memory. The program has no shared memory.

    Attributes:
      x: bfloat16 ``[rows, in_features]``.
      level_gains: float32 ``[P]``.
      codes, records: Outputs, see ``lane_context.Refs``.
      shared: Not used.
    """

    x: Any
    level_gains: Any
    codes: Any
    records: Any
    shared: Any


def coding_blocks(g: Geometry) -> int:
    """Returns the number of CTAs."""
    return g.row_batches * g.rows_per_cta * g.groups // (CODING_THREADS // LANES)


def coding_program(isa: Instructions, g: Geometry, in_features: int, refs: CodingRefs) -> None:
    """Codes one activation row in one group: four channels in each lane."""
    thread = isa.thread_index()
    lane = thread & (LANES - 1)
    item = isa.block_index() * (CODING_THREADS // LANES) + (thread >> 5)
    row, group = item // g.groups, item % g.groups
    batch, row_of_cta = row // g.rows_per_cta, row % g.rows_per_cta
    matrix, j, column = lane >> 3, (lane >> 2) & 1, lane & 3
    channel = group * layout.GROUP + matrix * MATRIX_CHANNELS + (j << 4) + (column << 1)
    x = [load_activation(isa, g, in_features, refs, row, channel + offset) for offset in (0, 1, 8, 9)]

    peak = isa.float_to_bits(isa.absolute(x[0]))
    for number in x[1:]:
        peak = isa.maximum(peak, isa.float_to_bits(isa.absolute(number)))
    peak = isa.bits_to_float(isa.maximum(isa.reduce_max(peak), isa.constant(SMALLEST_PEAK_BITS)))
    unit = peak * (1.0 / PEAK_CODE)
    inverse_unit, rounding = isa.reciprocal(unit), isa.constant(ROUNDING, "f32")
    bits = [isa.float_to_bits(isa.multiply_add(number, inverse_unit, rounding)) for number in x]

    blob = batch * g.groups + group
    octets = g.rows_per_cta // OCTET
    octet, half, n = row_of_cta >> 3, (row_of_cta >> 2) & 1, (row_of_cta & 3) << 1
    operand = ((blob * GROUP_MATRICES + matrix) * octets + octet) * LANES + (n << 2) + column
    address = isa.global_address(refs.codes) + isa.widen((operand << 4) + (half << 3) + (j << 2))
    signed = [word ^ LOW_SIGN for word in bits]
    pairs = [isa.permute_bytes(signed[i], signed[i + 1], 0x5140) for i in (0, 2)]  # low, low, high, high
    isa.store_global(address, [isa.permute_bytes(pairs[0], pairs[1], 0x7632)])
    isa.store_global(address + 16 * 4, [isa.permute_bytes(pairs[0], pairs[1], 0x5410)])

    total = bits[0] + bits[1] + bits[2] + bits[3] - 4 * ROUNDED_ZERO
    high = (bits[0] >> 8) + (bits[1] >> 8) + (bits[2] >> 8) + (bits[3] >> 8) - 4 * (ROUNDED_ZERO >> 8)
    start_high, start_low = starts(isa, g, isa.reduce_add(total), isa.reduce_add(high))
    with isa.when(lane.equals(0)):
        (gain,) = isa.load_global(isa.global_address(refs.level_gains) + 4 * (g.level - 1), 1, "f32")
        records = isa.global_address(refs.records) + isa.widen(blob * (20 * g.rows_per_cta))
        isa.store_global(records + isa.widen(row_of_cta << 4), [start_high, start_low, start_high, start_low])
        scaled_unit = unit * gain * (1.0 / CODE_STEPS)
        isa.store_global(records + isa.widen((row_of_cta << 2) + 16 * g.rows_per_cta), [scaled_unit])


def load_activation(
    isa: Instructions, g: Geometry, in_features: int, refs: CodingRefs, row: Value, channel: Value
) -> Value:
    """Loads ``x[row, channel]`` as f32; zero in padding."""
    first = isa.global_address(refs.x)
    address = first + isa.widen((row * in_features + channel) << 1)
    exists = (row < g.rows) & (channel < in_features)
    bits = isa.load_global_16(isa.select(exists, address, first))
    return isa.bits_to_float(isa.select(exists, bits, isa.constant(0)) << 16)


def starts(isa: Instructions, g: Geometry, total: Value, high: Value) -> tuple[Value, Value]:
    """Returns the words that the sums with high and with low bytes start with, from the sums of x.

    Twice the midpoint is an integer. If half of the product with the high bytes is none, the rest, 128 low
    bytes, goes to the other sum.
    """
    twice_midpoint = round(2 * DIGIT_MEAN * sum(4 ** (3 - f) for f in range(g.level)))
    high_product = high * twice_midpoint
    start_high = half_of(high_product)
    rest = high_product - start_high * 2
    start_low = half_of((total - high * 256) * twice_midpoint) + rest * 128
    zero = isa.constant(ZERO)
    return zero - start_high, zero - start_low


def half_of(number: Value) -> Value:
    """Returns half of an integer, rounded down. Its magnitude is below ``2**30``."""
    return ((number + 2**30) >> 1) - 2**29
