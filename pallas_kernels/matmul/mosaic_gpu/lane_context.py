"""Indices and addresses of a lane: the outputs, channels and activation rows that it works on."""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import WORD_WARPS, Geometry

ROW_BYTES = layout.TILE_WORDS * 4
"""Bytes of a row of a plane in a whole tile."""

PIECES = layout.TILE_PIECES
"""Pieces of a whole tile."""


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      x: bfloat16 ``[terms, padded_rows, K]``: the activations, and at level 4 the activations / 128.
      sums: float32 ``[groups, padded_rows]``: sums of x over each group.
      planes, scales: See ``NestedWeight``.
      partials: Output, float32 ``[splits, rows, N]``: partial sums of ``UNIT`` times y, without the gain of
        the level.
      shared: The shared memory.
    """

    x: Any
    sums: Any
    planes: Any
    scales: Any
    partials: Any
    shared: Any


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices and addresses of the lane."""

    row: Value
    """``lane // 4``: index of the lane's word in the warp, and of its activation row in B."""
    column: Value
    """``lane % 4``: index of the lane's 8 channels in a step, and of its pair of activation rows in C."""
    first_group: Value
    """First group of the CTA."""
    tile: Value
    first_row: Value
    """First activation row of the CTA."""
    split: Value
    first_position: Value | int
    """First digit position of the warp."""
    outputs: list[Value]
    """Index in the row of the lane's pairs of outputs, ``[position][q]`` as a flat list."""
    exists: Value | None
    """Whether the tile has the lane's piece; None if all tiles have all pieces."""
    words: Value
    """Shared-memory address of the lane's word of its first channel in plane 0, in slot 0."""
    x: Value
    """Global address of the lane's activations of the first row tile and the first group."""


def lane_context(isa: Instructions, g: Geometry, refs: Refs) -> LaneContext:
    """Computes the context. Over the grid the row batch varies fastest, then the tile, then the split."""
    thread, block = isa.thread_index(), isa.block_index()
    lane, warp = thread & (LANES - 1), thread >> 5
    row, column = lane >> 2, lane & 3
    batch = block % g.row_batches
    tile, split = block // g.row_batches % g.tiles, block // (g.row_batches * g.tiles)
    word = ((warp & (WORD_WARPS - 1)) << 3) + row
    part = warp >> 2
    first_position: Value | int = 0 if g.position_parts == 1 else part * g.positions
    chunk: Value | int = layout.TILE // 4
    piece, exists = word >> 2, None
    if g.last_tile_pieces < PIECES:
        whole, last = isa.constant(PIECES), isa.constant(g.last_tile_pieces)
        pieces = isa.select(tile < g.tiles - 1, whole, last)
        exists = piece < pieces
        piece, chunk = isa.select(exists, piece, isa.constant(0)), pieces * 16
    outputs = []
    for p in range(g.positions):
        position = isa.constant(p) + first_position
        chunk_index = (((word >> 1) & 1) << 1) + (position >> 1)
        for q in range(2):
            in_chunk = (piece << 4) + ((word & 1) << 3) + ((position & 1) << 1) + 4 * q
            outputs.append(tile * layout.TILE + chunk_index * chunk + in_chunk)
    first_group = split * g.groups_per_cta
    first_row = batch * g.rows_per_cta
    swizzled = (word >> 2) ^ (column << 1)
    in_step = (column << 3) * ROW_BYTES + (swizzled << 4) + ((word & 3) << 2)
    activation = (first_row + row) * g.stored_k + first_group * layout.GROUP + (column << 3)
    return LaneContext(
        row=row,
        column=column,
        first_group=first_group,
        tile=tile,
        first_row=first_row,
        split=split,
        first_position=first_position,
        outputs=outputs,
        exists=exists,
        words=isa.shared_address(refs.shared) + in_step,
        x=isa.global_address(refs.x) + isa.widen(activation << 1),
    )
