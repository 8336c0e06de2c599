"""Stores the partial sums of a CTA's part of a tile."""

import contextlib

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    LaneContext,
    Refs,
    activation_row,
    chunk,
    tile_pieces,
)
from pallas_kernels.matmul.mosaic_gpu.multiplication import index


def store(
    isa: Instructions,
    g: Geometry,
    refs: Refs,
    context: LaneContext,
    tile: Value,
    ends_tile: Value,
    totals: list[Value],
) -> None:
    """Stores the totals, twice four neighbouring outputs of each of the lane's activation rows.

    The partial sums of a tile are numbered by its CTAs. The CTA with the end of the tile stores zeros as the
    partial sums that the tile does not have, but another one has.
    """
    split = context.block - tile * g.groups // g.units_per_cta
    store_split(isa, g, refs, context, tile, split, totals)
    with isa.when(ends_tile):
        zeros = [isa.constant(0.0, "f32")] * len(totals)

        def body(i: Value, carry: list[Value]) -> list[Value]:
            store_split(isa, g, refs, context, tile, split + 1 + i, zeros)
            return carry

        isa.loop(isa.constant(g.splits - 1) - split, [], body)


def store_split(
    isa: Instructions,
    g: Geometry,
    refs: Refs,
    context: LaneContext,
    tile: Value,
    split: Value,
    totals: list[Value],
) -> None:
    """Stores the totals as partial sum number ``split``."""
    pieces = tile_pieces(isa, g, tile)
    first, chunk_outputs = chunk(isa, g, tile)
    row = context.lane >> 2
    outputs = [
        first + (((row >> 2) << 1) + part) * chunk_outputs + (context.piece << 4) + ((row & 3) << 2)
        for part in range(2)
    ]
    with contextlib.nullcontext() if pieces is None else isa.when(context.piece < pieces):
        for octet in range(g.octets):
            for half in range(2):
                in_batch = activation_row(g, context, octet, half)
                activation = context.batch * g.rows_per_cta + in_batch
                with isa.when(activation < g.rows):
                    offset = (split * g.rows + activation) * g.stored_n
                    for part, output in enumerate(outputs):
                        address = isa.global_address(refs.partials) + (isa.widen(offset + output) << 2)
                        first_total = [
                            2 * index(g, 2 * part + position, octet, half) for position in range(2)
                        ]
                        values = [totals[k + i] for k in first_total for i in range(2)]
                        isa.store_global(address, values)
