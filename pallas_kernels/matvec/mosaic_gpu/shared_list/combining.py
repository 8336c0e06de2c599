"""Phases combine and store: from the integer sums of a section to the partial sums of the CTA."""

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.reduction import Conversion
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import (
    PEAK_OFFSET,
    ROWS_PER_MATRIX,
    TABLE_BYTES,
    SharedListGeometry,
)
from pallas_kernels.matvec.mosaic_gpu.shared_list.lane_context import LaneContext, group_of_section
from pallas_kernels.matvec.mosaic_gpu.shared_list.streaming import accumulator

HALF_OUTPUTS = 128
"""Distance of the outputs of digit positions 2 and 3 from those of positions 0 and 1."""


def first_output(context: LaneContext) -> Value:
    """Returns the lane's first output in the tile.

    The lane holds byte pair ``lane_row`` of the warp's 16-byte piece of a row. By ``layout``, digit position
    ``p`` of byte ``i`` of the pair is output ``first_output + 128 (p // 2) + 2 (p % 2) + i``.
    """
    lane_row = context.lane >> 2
    return ((lane_row >> 2) << 8) + (context.warp << 4) + ((lane_row & 3) << 2)


def load_scales(
    isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext, section: Value
) -> list[Value]:
    """Loads the scales of the lane's 8 outputs, two float16 in a word, in the order of ``outputs``."""
    group = group_of_section(isa, g, context, section)
    first = group * g.stored_n + context.tile * layout.TILE + first_output(context)
    address = isa.global_address(refs.scales) + isa.widen(first << 1)
    return [
        word
        for half in range(2)
        for word in isa.load_global(address + 2 * HALF_OUTPUTS * half, 2, ordered=True)
    ]


def combine(
    isa: Instructions,
    g: SharedListGeometry,
    context: LaneContext,
    section: Value,
    accumulators: list[Value],
    scale_words: list[Value],
    totals: list[Value],
) -> list[Value]:
    """Adds a section to the totals, f32 ``[row tile][digit position][byte]``, flat, and returns them.

    The lane has the activation rows ``4 t + column``. The arithmetic is that of ``reduction.combine`` and
    ``reduction.reduce``, so that a row has the same bits as alone.
    """
    records = context.shared + g.records_base + (section & 1) * (TABLE_BYTES * g.rows)
    scales = [isa.half_to_float(word, half) for word in scale_words for half in ("low", "high")]
    out = []
    for t in range(g.row_tiles):
        row = row_of(context, t)
        if not exist_all(g, t):
            row = isa.select(row < g.rows, row, isa.constant(0))
        record = records + row * TABLE_BYTES
        sum_of_codes, *others = isa.load_shared(record, g.warps_per_row)
        for other in others:
            sum_of_codes = sum_of_codes + other
        (peak,) = isa.load_shared(record + PEAK_OFFSET, 1, "f32")
        conversion = Conversion.create(isa, sum_of_codes, peak)
        values = []
        for byte in range(2):
            pairs = [accumulators[accumulator(t, p) + 2 * byte :][:2] for p in range(4)]
            values.append(conversion.outputs(isa, pairs))
        for p in range(4):
            for byte in range(2):
                i = 2 * p + byte
                out.append(isa.multiply_add(values[byte][p], scales[i], totals[8 * t + i]))
    return out


def store_partials(
    isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext, totals: list[Value]
) -> None:
    """Stores the partial sums of the CTA."""
    for t in range(g.row_tiles):
        row = row_of(context, t)
        exists = isa.constant(True, "bool") if exist_all(g, t) else row < g.rows
        with isa.when(exists):
            first = (context.split * g.rows + row) * g.stored_n + context.tile * layout.TILE
            address = isa.global_address(refs.partials) + isa.widen((first + first_output(context)) << 2)
            for half in range(2):
                i = 8 * t + 4 * half
                isa.store_global(address + 4 * HALF_OUTPUTS * half, totals[i : i + 4])


def row_of(context: LaneContext, row_tile: int) -> Value:
    """Returns the lane's activation row in a row tile. It may not exist."""
    return (context.lane & 3) + ROWS_PER_MATRIX * row_tile


def exist_all(g: SharedListGeometry, row_tile: int) -> bool:
    """Returns whether all activation rows of a row tile exist."""
    return ROWS_PER_MATRIX * (row_tile + 1) <= g.rows
