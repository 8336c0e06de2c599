"""Arrays of the product at one level, and the indices of a lane."""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import PIECES, TEAM, TILE_ROW_BYTES, Geometry


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      x: bfloat16 ``[rows, K]``, zeros in the padding of K.
      planes, scales: See ``NestedWeight``.
      partials: Output, float32 ``[splits, rows, N]``: partial sums of y without the gain of the level, in
        the unit of ``kernel.unit``.
      shared: The shared memory.
    """

    x: Any
    planes: Any
    scales: Any
    partials: Any
    shared: Any


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices of the lane."""

    thread: Value
    lane: Value
    piece: Value
    """Index of the warp's piece in the tile."""
    parity: Value
    """Parity of the positions that the warp multiplies, 0 or 1: the index of its warpgroup."""
    batch: Value
    team: Value
    """Index of the CTA's team in its batch."""
    half: Value
    """Which tile of a stored one the CTA has."""
    first_unit: Value
    """First unit of the CTA."""
    units: Value
    """Number of units of the CTA."""
    shared: Value
    """Address of the shared memory."""

    def tile(self, stored_tile: Value) -> Value:
        """Returns the CTA's tile of a stored one."""
        return stored_tile * TEAM + self.half


def lane_context(isa: Instructions, g: Geometry, refs: Refs) -> LaneContext:
    """Computes the context. Neighbouring CTAs have the batches of the same planes, then their other half."""
    thread, block = isa.thread_index(), isa.block_index()
    warp = thread >> 5
    batch, block = block % g.row_batches, block // g.row_batches
    half, team = block % TEAM, block // TEAM
    first_unit = team * g.units_per_cta
    units, rest = isa.constant(g.units_per_cta), isa.constant(g.units) - first_unit
    if g.units % g.units_per_cta:
        units = isa.select(rest < g.units_per_cta, rest, units)
    return LaneContext(
        thread=thread,
        lane=thread & (LANES - 1),
        piece=warp & (PIECES - 1),
        parity=warp // PIECES,
        batch=batch,
        team=team,
        half=half,
        first_unit=first_unit,
        units=units,
        shared=isa.shared_address(refs.shared),
    )


def in_row(row: Value, piece: Value) -> Value:
    """Returns the offset of a piece of the row of a plane in shared memory.

    The pieces of 8 rows lie in all banks, so that a transposing load has no bank conflicts.
    """
    return row * TILE_ROW_BYTES + ((piece ^ ((row >> 1) & 3)) << 4)


def tile_pieces(isa: Instructions, g: Geometry, tile: Value) -> Value | None:
    """Returns the number of pieces that a tile has, not positive if it has none; None if all have ``PIECES``.

    A piece that the tile lacks is zeros, with the scales of piece 0, and is not stored.
    """
    if g.total_pieces % (TEAM * PIECES) == 0:
        return None
    rest = isa.constant(g.total_pieces) - tile * PIECES
    return isa.select(rest < PIECES, rest, isa.constant(PIECES))


def chunk(isa: Instructions, g: Geometry, tile: Value) -> tuple[Value, Value | int]:
    """Returns the place of a CTA's tile in the outputs of a row.

    Returns:
      The first output of piece 0 of the tile in chunk 0, and the number of outputs in a chunk. Output ``o``
      of piece ``p`` in chunk ``q`` is ``first + q chunk + 16 p + o`` (see ``layout``).
    """
    whole = layout.TILE // 4
    layout_tile, half = tile // TEAM, tile % TEAM
    first = layout_tile * layout.TILE + half * (16 * PIECES)
    last_pieces = layout.last_tile_pieces(g.stored_n)
    if last_pieces == layout.TILE_PIECES:
        return first, whole
    is_whole = layout_tile < g.stored_n // layout.TILE
    return first, isa.select(is_whole, isa.constant(whole), isa.constant(16 * last_pieces))


def output_in_chunk(context: LaneContext) -> Value:
    """Returns the first of the lane's two neighbouring outputs in a chunk of its piece.

    Lane ``4 row + column`` has outputs of the chunks ``2 (row // 4)`` and the next one, where output ``4 (row
    % 4) + 2 parity + i`` is row ``row + 8 i`` of C.
    """
    return (((context.lane >> 2) & 3) << 2) + (context.parity << 1)


def first_chunk(context: LaneContext) -> Value:
    """Returns the first of the lane's two chunks."""
    return (context.lane >> 4) << 1
