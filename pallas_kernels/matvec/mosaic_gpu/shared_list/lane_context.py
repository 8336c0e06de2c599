"""The context of a lane: its indices in the grid and the CTA."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.listing import load_activation
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import SharedListGeometry
from pallas_kernels.matvec.mosaic_gpu.tile import pieces_of_tile


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices of the lane."""

    thread: Value
    lane: Value
    warp: Value
    tile: Value
    pieces: Value | None
    """Number of pieces of the tile; None if all tiles of the launch have 8."""
    split: Value
    shared: Value
    """Address of the CTA's shared memory."""


def lane_context(isa: Instructions, g: SharedListGeometry, refs: Refs) -> LaneContext:
    """Computes the context. Over the grid the tile varies fastest, then the split."""
    block, thread = isa.block_index(), isa.thread_index()
    lane, warp, tile = thread & (LANES - 1), thread >> 5, block % g.tiles
    return LaneContext(
        thread=thread,
        lane=lane,
        warp=warp,
        tile=tile,
        pieces=pieces_of_tile(isa, g, tile),
        split=block // g.tiles,
        shared=isa.shared_address(refs.shared),
    )


def first_channel(g: SharedListGeometry, context: LaneContext) -> Value:
    """Returns the first input channel of the CTA."""
    return context.split * g.cta_channels


def load_x(isa: Instructions, g: SharedListGeometry, refs: Refs, row: Value, channel: Value) -> Value:
    """Loads ``x[row, channel]`` as ``f32``; zero in padding."""
    x = isa.global_address(refs.x)
    address = x + isa.widen((row * g.in_features + channel) * g.x_bytes)
    if not g.has_padding:
        return load_activation(isa, g, address)
    exists = channel < g.in_features
    number = load_activation(isa, g, isa.select(exists, address, x))
    return isa.select(exists, number, isa.constant(0.0, "f32"))


def group_of_section(isa: Instructions, g: SharedListGeometry, context: LaneContext, section: Value) -> Value:
    """Returns the group of a section; group 0, to keep addresses in bounds, if it does not exist."""
    group = first_channel(g, context) // layout.GROUP + section // g.config.warps_per_group
    return isa.select(group < g.groups, group, isa.constant(0)) if g.has_padding else group
