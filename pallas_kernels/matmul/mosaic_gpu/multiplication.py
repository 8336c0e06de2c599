"""Turns digits into operands of the matrix unit, and its sums of a group into partial sums of y."""

import functools
import operator

from pallas_kernels.codes import DIGIT_MEAN
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import (
    CODE_PLANES,
    MATRIX_ROWS,
    PLANE_STEP_BYTES,
    STEP_CHANNELS,
    Geometry,
)
from pallas_kernels.matmul.mosaic_gpu.lane_context import ROW_BYTES, LaneContext, Refs

BFLOAT16_128 = 0x43004300
"""Bits of two bfloat16 128."""

UNIT = 16
"""Value of 1 in units of the sums, which the caller divides by: a digit of plane 0 counts 16."""


def offset_of(level: int) -> float:
    """Returns the number that the sums have too much for each unit of x."""
    midpoint = DIGIT_MEAN * sum(4.0 ** (2 - f) for f in range(level))
    return 128 + midpoint + (1 if level > CODE_PLANES else 0)


def load_scales(isa: Instructions, g: Geometry, refs: Refs, context: LaneContext, group: Value) -> list:
    """Loads the scales of the lane's pairs of outputs, ``[position][q]``, two in a word."""
    first = isa.global_address(refs.scales) + isa.widen((group * g.stored_n) << 1)
    return [isa.load_global(first + isa.widen(output << 1))[0] for output in context.outputs]


def load_sums(isa: Instructions, g: Geometry, refs: Refs, context: LaneContext, group: Value) -> list:
    """Loads the sums of x over the group, two activation rows of each row tile."""
    first = group * g.padded_rows + context.first_row + (context.column << 1)
    address = isa.global_address(refs.sums) + isa.widen(first << 2)
    return [isa.load_global(address + 4 * MATRIX_ROWS * t, 2, "f32") for t in range(g.row_tiles)]


def load_activations(isa: Instructions, g: Geometry, context: LaneContext, step: Value) -> list:
    """Loads the lane's activations of a step, ``[term][row tile]``, 8 channels in 4 words."""
    address = context.x + isa.widen((step * STEP_CHANNELS) << 1)
    return [
        [
            isa.load_global(address + 2 * g.stored_k * (term * g.padded_rows + MATRIX_ROWS * t), 4)
            for t in range(g.row_tiles)
        ]
        for term in range(g.terms)
    ]


def multiply_step(
    isa: Instructions,
    g: Geometry,
    context: LaneContext,
    accumulators: list[Value],
    slot: Value,
    activations: list[list[list[Value]]],
) -> list[Value]:
    """Multiplies one step and returns the new accumulators ``[position][q][row tile][4]``, a flat list."""
    out = list(accumulators)
    for s in range(2):
        # [channel of the lane: 2 j + e][plane]
        words = [
            [
                isa.load_shared(slot + (PLANE_STEP_BYTES * f + ROW_BYTES * (4 * s + k)))[0]
                for f in range(g.level)
            ]
            for k in range(4)
        ]
        if g.position_parts > 1:
            shift = isa.constant(0) + context.first_position * 2
            words = [[word >> shift for word in planes] for planes in words]
        for term in range(g.terms):
            for p in range(g.positions):
                codes = [position_codes(planes, p, term) for planes in words]
                for q in range(2):
                    # Register i + 2 j of A: byte 2 q + i of the channels 2 j and 2 j + 1.
                    a = [
                        bfloat16_pair(isa, codes[2 * j], codes[2 * j + 1], 2 * q + i)
                        for j in range(2)
                        for i in range(2)
                    ]
                    for t in range(g.row_tiles):
                        first = accumulator(g, p, q, t)
                        b = activations[term][t][2 * s : 2 * s + 2]
                        sums = isa.matrix_multiply_add_bfloat16(out[first : first + 4], a, b)
                        out[first : first + 4] = sums
    return out


def position_codes(planes: list[Value], position: int, term: int) -> Value:
    """Joins the digits at one position of the four bytes to codes of 7 bits, one in each byte.

    Term 0 has the digits of planes 0 to 2 at bits 4, 2 and 0; term 1 that of plane 3 at bit 5.
    """
    targets = {f: 2 * (2 - f) for f in range(min(len(planes), CODE_PLANES))} if term == 0 else {3: 5}
    digits = []
    for f, bit in targets.items():
        shift = bit - 2 * position
        shifted = planes[f] << shift if shift >= 0 else planes[f] >> -shift
        digits.append(shifted & (0x03030303 << bit))
    return functools.reduce(operator.or_, digits)


def bfloat16_pair(isa: Instructions, low: Value, high: Value, byte: int) -> Value:
    """Returns two bfloat16: 128 + byte ``byte`` of ``low`` and of ``high``."""
    pair = isa.permute_bytes(low, high, byte * 0x1111 + 0x4400)
    return (pair & 0x00FF00FF) | BFLOAT16_128


def accumulator(g: Geometry, position: int, q: int, row_tile: int) -> int:
    """Returns the index of the first of four accumulators."""
    return 4 * ((2 * position + q) * g.row_tiles + row_tile)


def add_group(
    isa: Instructions,
    g: Geometry,
    totals: list[Value],
    accumulators: list[Value],
    scales: list[Value],
    sums: list[list[Value]],
) -> list[Value]:
    """Returns the totals plus the sums of one group, without their offset, times the scales."""
    offset = isa.constant(-offset_of(g.level), "f32")
    out = list(totals)
    for pair, packed in enumerate(scales):
        pair_scales = [isa.half_to_float(packed, half) for half in ("low", "high")]
        for t in range(g.row_tiles):
            first = accumulator(g, pair // 2, pair % 2, t)
            for i in range(2):
                for j in range(2):
                    k = first + 2 * i + j
                    product = isa.multiply_add(offset, sums[t][j], accumulators[k])
                    out[k] = isa.multiply_add(product, pair_scales[i], totals[k])
    return out
