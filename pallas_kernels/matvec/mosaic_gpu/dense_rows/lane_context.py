"""The context of a lane: its indices in the grid and the CTA."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import DenseRowsGeometry
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.tile import pieces_of_tile


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices of the lane."""

    thread: Value
    lane: Value
    warp: Value
    """Index of the warp, and of its piece of every plane row."""
    first_tile: Value
    """First tile of the CTA."""
    tiles: Value
    """Number of tiles of the CTA."""
    split: Value
    shared: Value
    """Address of the CTA's shared memory."""


def lane_context(isa: Instructions, g: DenseRowsGeometry, refs: Refs) -> LaneContext:
    """Computes the context. Over the grid the tiles vary fastest, then the split."""
    block, thread = isa.block_index(), isa.thread_index()
    warp = thread >> 5
    first_tile = (block % g.tile_groups) * g.dense.tiles
    tiles = isa.constant(g.dense.tiles)
    if g.tiles % g.dense.tiles:
        left = isa.constant(g.tiles) - first_tile
        tiles = isa.select(left < g.dense.tiles, left, tiles)
    return LaneContext(
        thread=thread,
        lane=thread & (LANES - 1),
        warp=warp,
        first_tile=first_tile,
        tiles=tiles,
        split=block // g.tile_groups,
        shared=isa.shared_address(refs.shared),
    )


def first_channel(g: DenseRowsGeometry, context: LaneContext) -> Value:
    """Returns the first input channel of the CTA."""
    return context.split * (g.cta_groups * layout.GROUP)


def pieces_of(isa: Instructions, g: DenseRowsGeometry, context: LaneContext, tile: Value) -> Value | None:
    """Returns the number of pieces of a tile of the CTA; None if all tiles of the launch have 8."""
    return pieces_of_tile(isa, g, context.first_tile + tile)


def slot_offset(g: DenseRowsGeometry, item: Value, step: int) -> Value | int:
    """Returns the offset in the ring of the slot of a step of an item."""
    if len(g.steps) % g.slots == 0:
        return step % g.slots * g.slot_bytes
    return ((item * len(g.steps) + step) & (g.slots - 1)) * g.slot_bytes


def in_ring(ring: Value, row: Value, piece: Value) -> Value:
    """Returns the address of a 16-byte piece of a row, swizzled to avoid bank conflicts on both sides."""
    return ring + row * ROW_BYTES + ((piece ^ (row & 7)) << 4)


def place_of(
    isa: Instructions, g: DenseRowsGeometry, context: LaneContext, item: Value
) -> tuple[Value, Value]:
    """Returns the tile (of the CTA) and the section of an item; tile 0 if there is no such item.

    The items of a CTA are the sections of its first tile, then those of the second, and so on.
    """
    if g.dense.tiles == 1:
        return isa.constant(0), item % g.sections
    tile = item // g.sections
    return isa.select(tile < context.tiles, tile, isa.constant(0)), item % g.sections
