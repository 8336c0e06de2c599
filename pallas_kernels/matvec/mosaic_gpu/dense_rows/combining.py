"""Phases combine and store: from the integer sums of a section to the partial sums of the CTA."""

import contextlib

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import (
    RECORD_BYTES,
    ROWS_PER_MATRIX,
    DenseRowsGeometry,
)
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import (
    LaneContext,
    first_channel,
    pieces_of,
    place_of,
)
from pallas_kernels.matvec.mosaic_gpu.dense_rows.multiplying import accumulator
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.reduction import Conversion
from pallas_kernels.matvec.mosaic_gpu.tile import chunk_outputs, stored_piece


def first_output(isa: Instructions, context: LaneContext, pieces: Value | None) -> Value:
    """Returns the lane's first output of half 0 in the warp's piece, or in piece 0 if the tile lacks it.

    The lane holds byte pair ``lane_row`` of the 16 bytes of the piece. By ``layout``, digit position ``p`` of
    byte ``i`` of the pair is output ``first_output + chunk_outputs (p // 2) + 2 (p % 2) + i``. The outputs of
    ``p // 2`` are a *half*.
    """
    lane_row, index = context.lane >> 2, context.warp
    if pieces is None:
        return ((lane_row >> 2) << 8) + (index << 4) + ((lane_row & 3) << 2)
    index = stored_piece(isa, index, pieces)
    return (lane_row >> 2) * (2 * chunk_outputs(pieces)) + (index << 4) + ((lane_row & 3) << 2)


def distance_of_half(isa: Instructions, half: int, pieces: Value | None, output_bytes: int) -> Value | int:
    """Returns the distance in bytes from the outputs of half 0 to those of a half."""
    distance = chunk_outputs(pieces) * output_bytes * half
    return distance if isinstance(distance, int) else isa.widen(distance)


def load_scales(
    isa: Instructions, g: DenseRowsGeometry, refs: Refs, context: LaneContext, item: Value
) -> list[Value]:
    """Loads the scales ``[half][2]`` of an item: words of two float16."""
    tile, section = place_of(isa, g, context, item)
    pieces = pieces_of(isa, g, context, tile)
    words: list[Value] = []
    output = (context.first_tile + tile) * layout.TILE + first_output(isa, context, pieces)
    group = first_channel(g, context) // layout.GROUP + section // g.config.warps_per_group
    if g.has_padding:
        group = isa.select(group < g.groups, group, isa.constant(0))
    address = isa.global_address(refs.scales) + isa.widen((group * g.stored_n + output) << 1)
    for half in range(2):
        words += isa.load_global(address + distance_of_half(isa, half, pieces, 2), 2, ordered=True)
    return words


def new_totals(isa: Instructions, g: DenseRowsGeometry) -> list[Value]:
    """Returns totals ``[row tile][half][4]`` of -0. Adding to -0 changes no bit, not even a sign."""
    return [isa.constant(-0.0, "f32")] * (g.row_tiles * 8)


def combine(
    isa: Instructions,
    g: DenseRowsGeometry,
    context: LaneContext,
    section: Value,
    accumulators: list[Value],
    scales: list[Value],
    totals: list[Value],
) -> list[Value]:
    """Adds a section to the totals; returns the new totals.

    The lane has the activation rows ``4 t + column``. The operations are those of ``reduction.combine`` and
    ``reduction.reduce``, in the same order, so that a row has the same bits as alone.
    """
    records = context.shared + g.records_base + (section * g.padded_rows + (context.lane & 3)) * RECORD_BYTES
    conversions = []
    for t in range(g.row_tiles):
        record = isa.load_shared(records + t * (ROWS_PER_MATRIX * RECORD_BYTES), 2, "f32")
        conversions.append(Conversion.of(isa, *record))
    out = list(totals)
    numbers = [isa.half_to_float(word, part) for word in scales for part in ("low", "high")]
    for t, conversion in enumerate(conversions):
        vector = outputs(isa, conversion, accumulators, t)
        now = slice(8 * t, 8 * t + 8)
        out[now] = [isa.multiply_add(*three) for three in zip(vector, numbers, out[now], strict=True)]
    return out


def outputs(
    isa: Instructions,
    conversion: Conversion,
    accumulators: list[Value],
    row_tile: int,
) -> list[Value]:
    """Returns the lane's outputs ``[half][4]``, flat and not yet scaled, of one section and row tile."""
    first = accumulator(row_tile, 0)
    even, odd = [
        conversion.outputs(isa, [accumulators[first + 4 * p + 2 * i :][:2] for p in range(4)])
        for i in range(2)
    ]
    return [v for pair in zip(even, odd, strict=True) for v in pair]


def store_partials(
    isa: Instructions,
    g: DenseRowsGeometry,
    refs: Refs,
    context: LaneContext,
    tile: Value,
    totals: list[Value],
) -> None:
    """Stores the partial sums of a tile of the CTA."""
    pieces = pieces_of(isa, g, context, tile)
    for t in range(g.row_tiles):
        row = (context.lane & 3) + ROWS_PER_MATRIX * t
        whole = ROWS_PER_MATRIX * (t + 1) <= g.rows
        with contextlib.nullcontext() if whole else isa.when(row < g.rows):
            first_of_row = (context.split * g.rows + row) * g.stored_n
            with contextlib.nullcontext() if pieces is None else isa.when(context.warp < pieces):
                output = (context.first_tile + tile) * layout.TILE
                output = first_of_row + output + first_output(isa, context, pieces)
                address = isa.global_address(refs.partials) + isa.widen(output << 2)
                for half in range(2):
                    vector = totals[8 * t + 4 * half :][:4]
                    isa.store_global(address + distance_of_half(isa, half, pieces, 4), vector)
