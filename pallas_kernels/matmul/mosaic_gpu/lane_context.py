"""Arrays of the product at one level, and the indices of a lane."""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import OCTET, Geometry


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      x: bfloat16 ``[rows, in_features]``, or None if the CTAs do not code the activations.
      codes: uint32 ``[batches, groups, 4, octets of the CTA, 32, 4]``: the codes of the activations as
        operands B. The last axis has the registers ``2 t + j`` of lane ``4 n + c``, with ``t`` and ``j`` in
        0..1: byte ``e`` is the code of activation row ``4 t + n // 2`` of the octet and channel ``16 j + 8
        (e // 2) + 2 c + e % 2``, the high byte if ``n`` is even, else the low byte.
        None if the CTAs code the activations.
      records: uint32 ``[batches, groups, 2, rows of the CTA, 4]``: for each row the words ``high, low, high,
        low`` that the sums of a group start with, then for each row its factors (see ``coding``); or None.
      planes, scales: See ``NestedWeight``.
      partials: Output, float32 ``[splits, rows, N]``: partial sums of y without the gain of the level, in
        units of ``coding.CODE_UNIT / CODE_STEPS``.
      shared: The shared memory.
    """

    x: Any
    codes: Any
    records: Any
    planes: Any
    scales: Any
    partials: Any
    shared: Any

    @classmethod
    def of(cls, g: Geometry, *refs: Any) -> "Refs":
        """Returns the arrays of a launch, which lacks either x, or codes and records."""
        return cls(refs[0], None, None, *refs[1:]) if g.codes_activations else cls(None, *refs)


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices of the lane."""

    lane: Value
    piece: Value
    """Index of the warp's piece in the tile."""
    row_part: Value | int
    """Index of the warp's part of the activation rows."""
    batch: Value
    block: Value
    """Index of the CTA among those of its batch."""
    first_unit: Value
    """First unit of the CTA."""
    units: Value
    """Number of units of the CTA."""
    shared: Value
    """Address of the shared memory."""


def lane_context(isa: Instructions, g: Geometry, refs: Refs) -> LaneContext:
    """Computes the context. Over the grid the batch varies fastest: its CTAs share planes in the L2."""
    thread, block = isa.thread_index(), isa.block_index()
    warp = thread >> 5
    batch, block = block % g.row_batches, block // g.row_batches
    first_unit = block * g.units_per_cta
    units, rest = isa.constant(g.units_per_cta), isa.constant(g.units) - first_unit
    if g.units % g.units_per_cta:
        units = isa.select(rest < g.units_per_cta, rest, units)
    return LaneContext(
        lane=thread & (LANES - 1),
        piece=warp if g.row_parts == 1 else warp & (g.pieces - 1),
        row_part=0 if g.row_parts == 1 else warp // g.pieces,
        batch=batch,
        block=block,
        first_unit=first_unit,
        units=units,
        shared=isa.shared_address(refs.shared),
    )


def first_octet(g: Geometry, context: LaneContext) -> Value | int:
    """Returns the warp's first octet of activation rows in the CTA."""
    return context.row_part * g.octets


def in_row(g: Geometry, row: Value, piece: Value) -> Value:
    """Returns the offset of a piece of the row of a plane in shared memory.

    The pieces of 8 rows lie in all banks, so that a transposing load has no bank conflicts.
    """
    swizzle = row & 7 if g.pieces == layout.TILE_PIECES else (row >> 1) & 3
    return row * g.row_bytes + ((piece ^ swizzle) << 4)


def tile_pieces(isa: Instructions, g: Geometry, tile: Value) -> Value | None:
    """Returns the number of pieces that a CTA's tile has; None if all tiles have ``g.pieces``.

    The CTA copies and multiplies piece 0 in place of a piece that the tile lacks, and does not store it.
    """
    if g.total_pieces % g.pieces == 0:
        return None
    rest = isa.constant(g.total_pieces) - tile * g.pieces
    return isa.select(rest < g.pieces, rest, isa.constant(g.pieces))


def chunk(isa: Instructions, g: Geometry, tile: Value) -> tuple[Value, Value | int]:
    """Returns the place of a CTA's tile in the outputs of a row.

    Returns:
      The first output of piece 0 of the tile in chunk 0, and the number of outputs in a chunk. Output ``o``
      of piece ``p`` in chunk ``q`` is ``first + q chunk + 16 p + o`` (see ``layout``).
    """
    whole = layout.TILE // 4
    if g.pieces == layout.TILE_PIECES:
        layout_tile, first = tile, tile * layout.TILE
    else:
        parts = layout.TILE_PIECES // g.pieces
        layout_tile, part = tile // parts, tile % parts
        first = layout_tile * layout.TILE + part * (16 * g.pieces)
    last_pieces = layout.last_tile_pieces(g.stored_n)
    if last_pieces == layout.TILE_PIECES:
        return first, whole
    is_whole = layout_tile < g.stored_n // layout.TILE
    return first, isa.select(is_whole, isa.constant(whole), isa.constant(16 * last_pieces))


def activation_row(g: Geometry, context: LaneContext, octet: int, half: int) -> Value:
    """Returns the index in the CTA of the lane's activation row in half ``half`` of one of its octets."""
    return (context.lane & 3) + (first_octet(g, context) + octet) * OCTET + 4 * half
