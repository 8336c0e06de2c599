"""Turns planes into operands of the matrix unit, and its sums of a group into partial sums of y."""

from pallas_kernels.lanes.fragments import gather_bytes
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import MATRIX_CHANNELS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    LaneContext,
    activation_row,
)

HIGH_PAIRS, HIGH_HALVES = 0xCCCCCCCC, 0xF0F0F0F0
"""Masks of the higher half of every 4 bits, and of every byte."""

OPERAND_BYTES = 512
"""Bytes of the operands B of an octet for one matrix instruction's channels: 16 in each lane."""


def starts(isa: Instructions, g: Geometry, context: LaneContext, records: Value) -> list[list[Value]]:
    """Returns the words that the sums of a group start with, four for each half of an octet."""
    return [
        isa.load_shared(records + (activation_row(g, context, octet, half) << 4), 4)
        for octet in range(g.octets)
        for half in range(2)
    ]


def multiply_step(
    isa: Instructions, g: Geometry, planes: Value, codes: Value, sums: list[list[Value]]
) -> list[list[Value]]:
    """Multiplies one step and returns the new sums ``[position][octet][half][4]``, flat but for the last.

    Args:
      isa, g: The instructions and sizes.
      planes, codes: The lane's addresses of the step's planes and codes.
      sums: The sums so far.
    """
    if g.warpgroups:
        return multiply_step_in_warpgroups(isa, g, planes, codes, sums)
    out = list(sums)
    for m in range(g.step_matrices):
        a = load_operands(isa, g, planes, m)
        for octet in range(g.octets):
            b = isa.load_shared(codes + (m * g.matrix_code_bytes + octet * OPERAND_BYTES), 4)
            for position in range(4):
                for half in range(2):
                    k = index(g, position, octet, half)
                    out[k] = isa.matrix_multiply_add(out[k], a[position], b[2 * half :][:2])
    return out


def multiply_step_in_warpgroups(
    isa: Instructions, g: Geometry, planes: Value, codes: Value, sums: list[list[Value]]
) -> list[list[Value]]:
    """Does what ``multiply_step`` does, and prepares operands A while the matrix unit has those before."""
    each = 2 * g.octets  # Number of fours of sums of a position.
    c = [[word for four in sums[each * p :][:each] for word in four] for p in range(4)]
    a = load_operands(isa, g, planes, 0)
    for m in range(g.step_matrices):

        def load_next(m=m) -> list[Value]:
            if m + 1 == g.step_matrices:
                return []
            return [word for registers in load_operands(isa, g, planes, m + 1) for word in registers]

        c, words = isa.warpgroup_multiply_add(c, a, codes + m * g.matrix_code_bytes, load_next)
        a = [words[4 * p :][:4] for p in range(4)]
    return [product[4 * k :][:4] for product in c for k in range(each)]


def load_operands(isa: Instructions, g: Geometry, planes: Value, m: int) -> list[list[Value]]:
    """Returns the operands A of the four digit positions for matrix ``m`` of a step."""
    first = planes + m * MATRIX_CHANNELS * g.row_bytes
    words = [isa.load_matrices_transposed(first + f * g.plane_step_bytes) for f in range(g.level)]
    return operands(isa, words)


def operands(isa: Instructions, words: list[list[Value]]) -> list[list[Value]]:
    """Returns the operands A of the four digit positions from the words of all planes."""
    planes = [gather_bytes(isa, four) for four in words]
    registers = [position_codes(isa, [plane[i] for plane in planes]) for i in range(4)]
    return [[codes[position] for codes in registers] for position in range(4)]


def position_codes(isa: Instructions, planes: list[Value]) -> list[Value]:
    """Joins the digits at each position of four bytes to a code, that of plane ``f`` in bits ``6 - 2 f``.

    Missing planes have digits 0. Digits of pairs of planes join to 4 bits, those of positions 0 and 2 in one
    word and those of positions 1 and 3 in another; then the 4 bits of both pairs join.
    """
    if len(planes) == 1:
        return [(planes[0] << (6 - 2 * p)) & 0xC0C0C0C0 for p in range(4)]
    first, second = planes[:2]
    even, odd = (
        isa.select_bits(HIGH_PAIRS, first << 2, second),
        isa.select_bits(HIGH_PAIRS, first, second >> 2),
    )
    if len(planes) == 2:
        return [
            word & HIGH_HALVES
            for pair in zip((even << 4, even), (odd << 4, odd), strict=True)
            for word in pair
        ]
    third = planes[2]
    if len(planes) == 3:
        low_even, low_odd = (third << 2) & HIGH_PAIRS, third & HIGH_PAIRS
    else:
        low_even = isa.select_bits(HIGH_PAIRS, third << 2, planes[3])
        low_odd = isa.select_bits(HIGH_PAIRS, third, planes[3] >> 2)
    return [
        isa.select_bits(HIGH_HALVES, even << 4, low_even),
        isa.select_bits(HIGH_HALVES, odd << 4, low_odd),
        isa.select_bits(HIGH_HALVES, even, low_even >> 4),
        isa.select_bits(HIGH_HALVES, odd, low_odd >> 4),
    ]


def index(g: Geometry, position: int, octet: int, half: int) -> int:
    """Returns the index of the four sums of a position, octet and half."""
    return 2 * (position * g.octets + octet) + half


def add_group(
    isa: Instructions,
    g: Geometry,
    context: LaneContext,
    scales: list[list[Value]],
    records: Value,
    totals: list[Value],
    sums: list[list[Value]],
) -> list[Value]:
    """Returns the totals plus the sums of a group times its scales and ``2**e``.

    The totals are ``[position][octet][half][2]``, flat, the last axis for two neighbouring outputs. The bits
    of a sum are those of the float32 ``ZERO_FLOAT + sum`` (see ``coding``).
    """
    out = list(totals)
    for octet in range(g.octets):
        for half in range(2):
            row = activation_row(g, context, octet, half)
            factors = isa.load_shared(records + (16 * g.rows_per_cta) + (row << 4), 4, "f32")
            for position in range(4):
                k = index(g, position, octet, half)
                for i in range(2):
                    high, low = (isa.bits_to_float(word) for word in sums[k][2 * i :][:2])
                    # The first step is exact: its result is a multiple of 256 2**e, and below 2**31 of them.
                    product = isa.multiply_add(low, factors[2], isa.multiply_add(high, *factors[:2]))
                    scale = scales[position // 2][2 * (position % 2) + i]
                    out[2 * k + i] = isa.multiply_add(product, scale, totals[2 * k + i])
    return out


def load_scales(isa: Instructions, g: Geometry, context: LaneContext, group_slot: Value) -> list[list[Value]]:
    """Loads the scales of the lane's two times four neighbouring outputs."""
    row = context.lane >> 2
    scales = []
    for part in range(2):
        chunk_index = ((row >> 2) << 1) + part
        output = (chunk_index * g.pieces + context.piece) * 16 + ((row & 3) << 2)
        words = isa.load_shared(group_slot + (output << 1), 2)
        scales.append([isa.half_to_float(word, half) for word in words for half in ("low", "high")])
    return scales
