"""The context of a lane of the matvec program: arrays, indices and shared-memory addresses."""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.geometry import SCALES_BYTES, Geometry
from pallas_kernels.matvec.mosaic_gpu.tile import pieces_of_tile

COPY_BYTES = 16
"""Bytes that a lane moves with one asynchronous copy."""


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      x: ``[rows, in_features]``; float32, bfloat16 or float16.
      thresholds: float32 ``[rows, P]``.
      square_partials: float32 ``[rows, S]``. The program divides x by the root of (their sum plus eps).
      level_gains: float32 ``[P]``, see ``NestedWeight``.
      planes, scales: See ``NestedWeight``.
      partials: Output, float32 ``[splits, rows, N]``: partial sums of y.
      stats: Output, float32 ``[rows, 2]``: mean bits read, and largest ``|x|``.
      shared: The shared memory.
      experts: int32 ``[rows]``, the expert of each row, if planes and scales have a leading axis of experts;
        else None.
    """

    x: Any
    thresholds: Any
    square_partials: Any
    level_gains: Any
    planes: Any
    scales: Any
    partials: Any
    stats: Any
    shared: Any
    experts: Any = None


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices of the lane, and the shared-memory addresses of its warp."""

    thread: Value
    lane: Value
    group: Value
    """Index of the warp's group in the weight. It may not exist; then all its channels count as padding."""
    channel: Value
    """The lane's first input channel. Its other channels follow at distances of 32."""
    split: Value
    tile: Value
    pieces: Value | None
    """Number of pieces of the tile; None if all tiles of the launch have 8."""
    first_row: Value
    """First activation row of the CTA."""
    shared: Value
    """Address of the CTA's shared memory."""
    list: Value
    """Address of the warp's list. It is computed in a way that tells the compiler that the whole warp has the
    same address; otherwise the compiler would treat loops over the list as divergent."""
    record: Value
    """Address of the warp's record."""
    scales: Value
    """Address of the warp's scales."""
    ring: Value
    """Address of the warp's ring."""
    expert: Value | None = None
    """Expert of the CTA's activation row; None if the weight has no axis of experts."""


def stored_group(isa: Instructions, g: Geometry, context: LaneContext) -> Value:
    """Returns the warp's group, or, to keep addresses in bounds, group 0 if that group does not exist."""
    if not g.has_padding:
        return context.group
    return isa.select(context.group < g.groups, context.group, isa.constant(0))


def weight_address(isa: Instructions, ref: Any, context: LaneContext, expert_bytes: int) -> Value:
    """Returns the global address of planes or scales: of the whole array, or of the part of the CTA's expert.

    Offsets inside one weight have 32 bits. The offset of an expert has 64, so its array may have any size.

    Args:
      isa: The instructions.
      ref: ``Refs.planes`` or ``Refs.scales``.
      context: Context of the lane.
      expert_bytes: Bytes of the array that belong to one expert.
    """
    address = isa.global_address(ref)
    return address if context.expert is None else address + isa.widen(context.expert) * expert_bytes


def load_expert(isa: Instructions, refs: Refs, row: Value | None) -> Value:
    """Loads the expert of an activation row, by default row 0.

    The load is ordered, because the compiler would move it behind the grading, to its use, and the lane would
    wait for memory twice.
    """
    address = isa.global_address(refs.experts)
    if row is not None:
        address = address + isa.widen(row << 2)
    return isa.load_global(address, ordered=True)[0]


def lane_context(isa: Instructions, g: Geometry, refs: Refs) -> LaneContext:
    """Computes the context. Over the grid the row batch varies fastest, then the tile, then the split."""
    config = g.config
    block, thread = isa.block_index(), isa.thread_index()
    row_batch = None
    if g.row_batches > 1:
        row_batch, block = block % g.row_batches, block // g.row_batches
    tile, split = block % g.tiles, block // g.tiles
    lane, warp = thread & (LANES - 1), thread >> 5
    group_of_cta, warp_of_group = warp // config.warps_per_group, warp % config.warps_per_group
    group = split * config.groups_per_cta + group_of_cta
    expert = None if refs.experts is None else load_expert(isa, refs, row_batch)
    shared = isa.shared_address(refs.shared)
    return LaneContext(
        thread=thread,
        lane=lane,
        group=group,
        channel=group * layout.GROUP + warp_of_group * (LANES * g.channels_per_lane) + lane,
        split=split,
        tile=tile,
        pieces=pieces_of_tile(isa, g, tile),
        first_row=isa.constant(0) if row_batch is None else row_batch * g.rows_per_cta,
        shared=shared,
        list=shared + isa.reduce_max(warp) * g.list_bytes,
        record=shared + g.record_base + warp * g.record_bytes,
        scales=shared + g.scales_base + warp * SCALES_BYTES,
        ring=shared + g.ring_base + warp * g.ring_bytes,
        expert=expert,
    )
