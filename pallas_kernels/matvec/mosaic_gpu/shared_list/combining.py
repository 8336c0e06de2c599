"""Phases combine and store: from the integer sums of a section to the partial sums of the CTA."""

import contextlib

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
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
from pallas_kernels.matvec.mosaic_gpu.tile import chunk_outputs, stored_piece


def first_output(isa: Instructions, g: SharedListGeometry, context: LaneContext, piece: int) -> Value:
    """Returns the lane's first output in one of the warp's pieces of the tile, or in piece 0 if it lacks it.

    The lane holds byte pair ``lane_row`` of the 16-byte piece of a row. By ``layout``, digit position ``p``
    of byte ``i`` of the pair is output ``first_output + chunk_outputs (p // 2) + 2 (p % 2) + i``.
    """
    lane_row = context.lane >> 2
    index = context.warp * g.pieces + piece
    if context.pieces is None:
        return ((lane_row >> 2) << 8) + (index << 4) + ((lane_row & 3) << 2)
    index = stored_piece(isa, index, context.pieces)
    return (lane_row >> 2) * (2 * chunk_outputs(context.pieces)) + (index << 4) + ((lane_row & 3) << 2)


def has_piece(g: SharedListGeometry, context: LaneContext, piece: int) -> Value | None:
    """Returns whether the tile has one of the warp's pieces; None if it has all of them."""
    return None if context.pieces is None else context.warp * g.pieces + piece < context.pieces


def chunk_bytes(isa: Instructions, context: LaneContext, output_bytes: int) -> Value | int:
    """Returns the distance in bytes of the outputs of digit positions 2 and 3 from those of 0 and 1."""
    distance = chunk_outputs(context.pieces) * output_bytes
    return distance if isinstance(distance, int) else isa.widen(distance)


def load_scales(
    isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext, section: Value
) -> list[list[Value]]:
    """Loads the scales of the lane's 8 outputs in each piece: words ``[piece][4]`` of two float16."""
    row = group_of_section(isa, g, context, section) * g.stored_n + context.tile * layout.TILE
    words, distance = [], chunk_bytes(isa, context, 2)
    for piece in range(g.pieces):
        first = isa.widen((row + first_output(isa, g, context, piece)) << 1)
        address = isa.global_address(refs.scales) + first
        halves = [isa.load_global(address + distance * i, 2, ordered=True) for i in range(2)]
        words.append(halves[0] + halves[1])
    return words


def total_address(g: SharedListGeometry, context: LaneContext, piece: int, row_tile: int) -> Value:
    """Returns the shared-memory address of the thread's first four totals; four more are one row later."""
    row = 2 * (piece * g.row_tiles + row_tile)
    return context.shared + (g.totals_base + row * 16 * g.threads) + (context.thread << 4)


def clear_totals(isa: Instructions, g: SharedListGeometry, context: LaneContext) -> None:
    """Sets the thread's totals to -0. Adding to -0 changes no bit, not even the sign of a zero."""
    zeros = [isa.constant(-0.0, "f32")] * 4
    for piece in range(g.pieces):
        for t in range(g.row_tiles):
            address = total_address(g, context, piece, t)
            isa.store_shared(address, zeros)
            isa.store_shared(address + 16 * g.threads, zeros)


def combine(
    isa: Instructions,
    g: SharedListGeometry,
    context: LaneContext,
    accumulators: list[Value],
    scale_words: list[list[Value]],
) -> None:
    """Adds a section to the totals of the thread.

    The lane has the activation rows ``4 t + column``. The operations are those of ``reduction.combine`` and
    ``reduction.reduce``, in the same order, so that a row has the same bits as alone.
    """
    records = context.shared + g.records_base
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
        for piece in range(g.pieces):
            first = accumulator(g, piece, t, 0)
            even, odd = [
                conversion.outputs(isa, [accumulators[first + 4 * p + 2 * i :][:2] for p in range(4)])
                for i in range(2)
            ]
            for half in range(2):
                address = total_address(g, context, piece, t) + half * (16 * g.threads)
                words = scale_words[piece][2 * half :][:2]
                scales = [isa.half_to_float(word, part) for word in words for part in ("low", "high")]
                values = [even[2 * half], odd[2 * half], even[2 * half + 1], odd[2 * half + 1]]
                totals = isa.load_shared(address, 4, "f32")
                isa.store_shared(
                    address,
                    [isa.multiply_add(*numbers) for numbers in zip(values, scales, totals, strict=True)],
                )


def store_partials(isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext) -> None:
    """Stores the partial sums of the CTA."""
    for t in range(g.row_tiles):
        row = row_of(context, t)
        exists = isa.constant(True, "bool") if exist_all(g, t) else row < g.rows
        with isa.when(exists):
            tile = (context.split * g.rows + row) * g.stored_n + context.tile * layout.TILE
            for piece in range(g.pieces):
                stores = has_piece(g, context, piece)
                with contextlib.nullcontext() if stores is None else isa.when(stores):
                    first = isa.widen((tile + first_output(isa, g, context, piece)) << 2)
                    address = isa.global_address(refs.partials) + first
                    distance = chunk_bytes(isa, context, 4)
                    for half in range(2):
                        source = total_address(g, context, piece, t) + half * (16 * g.threads)
                        totals = isa.load_shared(source, 4, "f32")
                        isa.store_global(address + distance * half, totals)


def row_of(context: LaneContext, row_tile: int) -> Value:
    """Returns the lane's activation row in a row tile. It may not exist."""
    return (context.lane & 3) + ROWS_PER_MATRIX * row_tile


def exist_all(g: SharedListGeometry, row_tile: int) -> bool:
    """Returns whether all activation rows of a row tile exist."""
    return ROWS_PER_MATRIX * (row_tile + 1) <= g.rows
