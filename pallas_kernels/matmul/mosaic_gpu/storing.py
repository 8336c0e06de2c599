"""Stores the partial sums of a CTA's part of a tile."""

import contextlib

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import OCTET, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    LaneContext,
    Refs,
    chunk,
    first_chunk,
    output_in_chunk,
    tile_pieces,
)
from pallas_kernels.matmul.mosaic_gpu.operands import POSITIONS


def store(
    isa: Instructions,
    g: Geometry,
    refs: Refs,
    context: LaneContext,
    stored_tile: Value,
    ends_tile: Value,
    totals: list[Value],
) -> None:
    """Stores the totals ``[position][octet][4]`` of the CTA's half of a stored tile.

    The partial sums of a tile are numbered by its teams. The team with the end of the tile stores zeros as
    the partial sums that the tile does not have, but another one has.
    """
    split, tile = context.team - stored_tile * g.groups // g.units_per_cta, context.tile(stored_tile)
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
    """Stores the totals as partial sum number ``split``, two neighbouring outputs at once."""
    pieces = tile_pieces(isa, g, tile)
    first, chunk_outputs = chunk(isa, g, tile)
    first = first + (context.piece << 4) + output_in_chunk(context)
    outputs = [first + (first_chunk(context) + position) * chunk_outputs for position in range(POSITIONS)]
    with contextlib.nullcontext() if pieces is None else isa.when(context.piece < pieces):
        for octet in range(g.octets):
            for column in range(2):
                in_batch = ((context.lane & 3) << 1) + (octet * OCTET + column)
                activation = context.batch * g.rows_per_cta + in_batch
                with isa.when(activation < g.rows):
                    offset = (split * g.rows + activation) * g.stored_n
                    for position, output in enumerate(outputs):
                        address = isa.global_address(refs.partials) + (isa.widen(offset + output) << 2)
                        k = 4 * (position * g.octets + octet) + column
                        isa.store_global(address, [totals[k], totals[k + 2]])
