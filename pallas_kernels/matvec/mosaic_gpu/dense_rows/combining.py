"""Phases combine and store: from the integer sums of a set to the partial sums of the CTA."""

import contextlib

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import (
    RECORD_BYTES,
    ROWS_PER_MATRIX,
    TEAM_THREADS,
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
    lane_row, index = context.lane >> 2, context.piece
    if pieces is None:
        return ((lane_row >> 2) << 8) + (index << 4) + ((lane_row & 3) << 2)
    index = stored_piece(isa, index, pieces)
    return (lane_row >> 2) * (2 * chunk_outputs(pieces)) + (index << 4) + ((lane_row & 3) << 2)


def halves(g: DenseRowsGeometry, context: LaneContext) -> list[Value | int]:
    """Returns the halves whose totals the thread has: with two teams, each has one half."""
    return [context.team] if g.teams > 1 else [0, 1]


def distance_of_half(
    isa: Instructions, half: Value | int, pieces: Value | None, output_bytes: int
) -> Value | int:
    """Returns the distance in bytes from the outputs of half 0 to those of another."""
    distance = chunk_outputs(pieces) * output_bytes * half
    return distance if isinstance(distance, int) else isa.widen(distance)


def load_scales(
    isa: Instructions, g: DenseRowsGeometry, refs: Refs, context: LaneContext, item: Value
) -> list[Value]:
    """Loads the scales ``[section of the set][half][2]`` of an item: words of two float16."""
    tile, chosen = place_of(isa, g, context, item)
    pieces = pieces_of(isa, g, context, tile)
    words: list[Value] = []
    output = (context.first_tile + tile) * layout.TILE + first_output(isa, context, pieces)
    for team in range(g.teams):
        section = chosen * g.teams + team
        group = first_channel(g, context) // layout.GROUP + section // g.config.warps_per_group
        if g.has_padding:
            group = isa.select(group < g.groups, group, isa.constant(0))
        address = isa.global_address(refs.scales) + isa.widen((group * g.stored_n + output) << 1)
        for half in halves(g, context):
            distance = distance_of_half(isa, half, pieces, 2)
            words += isa.load_global(address + distance, 2, ordered=True)
    return words


def new_totals(isa: Instructions, g: DenseRowsGeometry) -> list[Value]:
    """Returns totals ``[row tile][half][4]`` of -0. Adding to -0 changes no bit, not even a sign."""
    return [isa.constant(-0.0, "f32")] * (g.row_tiles * 8 // g.teams)


def combine(
    isa: Instructions,
    g: DenseRowsGeometry,
    context: LaneContext,
    chosen: Value,
    accumulators: list[Value],
    scales: list[Value],
    totals: list[Value],
) -> list[Value]:
    """Adds the sections of a set, in their order, to the totals; returns the new totals.

    The lane has the activation rows ``4 t + column``. The operations are those of ``reduction.combine`` and
    ``reduction.reduce``, in the same order, so that a row has the same bits as alone.
    """
    section = chosen * g.teams + context.team
    records = context.shared + g.records_base + (section * g.padded_rows + (context.lane & 3)) * RECORD_BYTES
    conversions = []
    for t in range(g.row_tiles):
        sum_of_codes, peak = isa.load_shared(records + t * (ROWS_PER_MATRIX * RECORD_BYTES), 2)
        conversions.append(Conversion.create(isa, sum_of_codes, isa.bits_to_float(peak)))
    out = list(totals)
    for first in range(0, g.row_tiles, g.row_tiles_at_once):
        now = range(first, min(first + g.row_tiles_at_once, g.row_tiles))
        own = [outputs(isa, conversions[t], accumulators, t) for t in now]
        if g.teams > 1:
            if first:
                isa.block_barrier()  # Now all threads have loaded the outputs before these.
            of_teams = exchanged(isa, g, context, own)
        else:
            of_teams = [own]
        for team, values in enumerate(of_teams):
            for t, vectors in zip(now, values, strict=True):
                for h, vector in enumerate(vectors):
                    factors = scales[2 * (h + len(vectors) * team) :][:2]
                    numbers = [isa.half_to_float(word, part) for word in factors for part in ("low", "high")]
                    j = 4 * (h + len(vectors) * t)
                    out[j : j + 4] = [
                        isa.multiply_add(*three)
                        for three in zip(vector, numbers, out[j : j + 4], strict=True)
                    ]
    return out


def outputs(
    isa: Instructions,
    conversion: Conversion,
    accumulators: list[Value],
    row_tile: int,
) -> list[list[Value]]:
    """Returns the lane's outputs ``[half][4]``, not yet scaled, of one section and row tile."""
    first = accumulator(row_tile, 0)
    even, odd = [
        conversion.outputs(isa, [accumulators[first + 4 * p + 2 * i :][:2] for p in range(4)])
        for i in range(2)
    ]
    return [[even[2 * h], odd[2 * h], even[2 * h + 1], odd[2 * h + 1]] for h in range(2)]


def exchanged(
    isa: Instructions, g: DenseRowsGeometry, context: LaneContext, own: list[list[list[Value]]]
) -> list[list[list[list[Value]]]]:
    """Returns ``[team][row tile][1][4]``: for each team, the outputs of the half whose totals the thread has.

    Args:
      isa, g, context: The instructions, sizes and indices.
      own: The thread's outputs ``[row tile][half][4]``.
    """
    vectors = 16 * TEAM_THREADS
    row_tile_bytes, team_bytes = 2 * vectors, 2 * vectors * g.row_tiles_at_once
    base = context.shared + g.exchange_base + (context.team_thread << 4)
    mine = base + context.team * team_bytes
    for i, outputs_of_tile in enumerate(own):
        for half, vector in enumerate(outputs_of_tile):
            isa.store_shared(mine + (i * row_tile_bytes + half * vectors), vector)
    isa.block_barrier()
    half = base + context.team * vectors
    return [
        [
            [isa.load_shared(half + (team * team_bytes + i * row_tile_bytes), 4, "f32")]
            for i in range(len(own))
        ]
        for team in range(g.teams)
    ]


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
            with contextlib.nullcontext() if pieces is None else isa.when(context.piece < pieces):
                output = (context.first_tile + tile) * layout.TILE
                output = first_of_row + output + first_output(isa, context, pieces)
                address = isa.global_address(refs.partials) + isa.widen(output << 2)
                for h, half in enumerate(halves(g, context)):
                    j = 4 * (h + len(halves(g, context)) * t)
                    isa.store_global(address + distance_of_half(isa, half, pieces, 4), totals[j : j + 4])
