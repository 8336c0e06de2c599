"""The context of a lane: its indices in the grid, the cluster and the CTA."""

import dataclasses

from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.cluster_list.geometry import ClusterListGeometry
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.shared_list import lane_context as shared_list
from pallas_kernels.matvec.mosaic_gpu.tile import pieces_of_tile


@dataclasses.dataclass(frozen=True)
class LaneContext(shared_list.LaneContext):
    """Indices of the lane. ``tile`` is the first tile of the CTA, ``split`` the index of its channels."""

    rank: Value
    """Index of the CTA in its cluster."""
    partial: Value
    """Index of the partial sum that the cluster writes."""


def lane_context(isa: Instructions, g: ClusterListGeometry, refs: Refs) -> LaneContext:
    """Computes the context. Over the grid the rank varies fastest, then the tile, then the partial sum."""
    block, thread = isa.block_index(), isa.thread_index()
    rank, unit = block % g.cluster, block // g.cluster
    tile_groups = g.tiles // g.tiles_per_cta
    tile, partial = unit % tile_groups * g.tiles_per_cta, unit // tile_groups
    return LaneContext(
        thread=thread,
        lane=thread & (LANES - 1),
        warp=thread >> 5,
        tile=tile,
        pieces=pieces_of_tile(isa, g, tile),
        split=partial * g.cluster + rank,
        shared=isa.shared_address(refs.shared),
        rank=rank,
        partial=partial,
    )
