"""Where a lane of the program is: its arrays, its part of the work, its shared memory."""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.geometry import SCALES_BYTES, Geometry

COPY_BYTES = 16
"""Bytes of one asynchronous copy of one lane."""


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the CTA's shared memory.

    ``x [rows, in_features]``; ``thresholds f32 [rows, P]``; ``squares f32 [rows, S]``, whose sum is the mean
    square that x is yet to be divided by the root of; ``gains``, ``planes`` and ``scales`` of the weight.
    Written: ``partials f32 [slice_groups, rows, N]`` and ``reading f32 [rows, 2]``, the mean
    bits read and the largest ``|x|``.
    """

    x: Any
    thresholds: Any
    squares: Any
    gains: Any
    planes: Any
    scales: Any
    partials: Any
    reading: Any
    shared: Any


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the lane is, and the shared-memory addresses it works on."""

    thread: Value
    lane: Value
    slice_index: Value
    """Of the whole weight; may lie past the last one, where all channels count as padding."""
    channel: Value
    """Input channel that is the lane's ``q = 0``; its next ones follow at distances of 32."""
    slice_group: Value
    tile: Value
    first_row: Value
    """First activation row of the CTA."""
    shared: Value
    list: Value
    """The warp's list. The compiler knows that it is the same in the whole warp, and so is what is computed
    from it: it would take a loop over steps of the list for a divergent one."""
    record: Value
    """The warp's record."""
    scales: Value
    """The warp's scales."""
    ring: Value
    """The warp's ring."""


def stored_slice(isa: Instructions, g: Geometry, place: Place) -> Value:
    """The warp's slice, or the first one where the warp's does not exist."""
    if not g.has_padding:
        return place.slice_index
    return isa.select(place.slice_index < g.slices, place.slice_index, isa.constant(0))


def locate(isa: Instructions, g: Geometry, refs: Refs) -> Place:
    """Cuts the grid: row group fastest, then tile, then slice group."""
    config = g.config
    block, thread = isa.block_index(), isa.thread_index()
    row_group, block = (block % g.row_groups, block // g.row_groups) if g.row_groups > 1 else (None, block)
    tile, slice_group = block % g.tiles, block // g.tiles
    lane, warp = thread & (LANES - 1), thread >> 5
    slice_of_group, part = warp // config.warps_per_slice, warp % config.warps_per_slice
    slice_index = slice_group * config.slices_per_cta + slice_of_group
    shared = isa.shared_address(refs.shared)
    return Place(
        thread=thread,
        lane=lane,
        slice_index=slice_index,
        channel=slice_index * layout.GROUP + part * (LANES * g.channels_per_lane) + lane,
        slice_group=slice_group,
        tile=tile,
        first_row=isa.constant(0) if row_group is None else row_group * g.rows_per_cta,
        shared=shared,
        list=shared + isa.reduce_max(warp) * g.list_bytes,
        record=shared + g.record_base + warp * g.record_bytes,
        scales=shared + g.scales_base + warp * SCALES_BYTES,
        ring=shared + g.ring_base + warp * g.ring_bytes,
    )
