"""Arrays of the product with copies of boxes, and the indices of a lane."""

import dataclasses
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.boxes.geometry import BoxesGeometry
from pallas_kernels.matmul.mosaic_gpu.geometry import PIECES
from pallas_kernels.matmul.mosaic_gpu.lane_context import InTile


@dataclasses.dataclass(frozen=True)
class BoxesRefs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      x: bfloat16 ``[rows, K]``, zeros in the padding of K.
      planes, scales: See ``NestedWeight``.
      gains: float32 ``[levels]``, ``NestedWeight.level_gains``.
      y: Output, float32 ``[rows, N]``.
      shared: The shared memory.
    """

    x: Any
    planes: Any
    scales: Any
    gains: Any
    y: Any
    shared: Any


@dataclasses.dataclass(frozen=True)
class BoxesContext(InTile):
    """Indices of the lane."""

    thread: Value
    rank: Value
    """Index of the CTA in its cluster."""
    batch: Value
    first_tile: Value
    """First tile of the cluster; the others follow at distances of ``clusters``."""
    tiles: Value
    """Number of tiles of the cluster."""
    first_group: Value
    """First group of the CTA in every tile."""
    groups: Value
    """Number of groups of the CTA in every tile."""
    shared: Value
    """Address of the shared memory."""


def boxes_context(isa: Instructions, g: BoxesGeometry, refs: BoxesRefs) -> BoxesContext:
    """Computes the context. Neighbouring clusters have the batches of the same tiles, which share planes."""
    thread, block = isa.thread_index(), isa.block_index()
    warp = thread >> 5
    rank, number = block % g.cluster, block // g.cluster
    batch, first_tile = number % g.row_batches, number // g.row_batches
    first_group = rank * g.groups // g.cluster
    return BoxesContext(
        thread=thread,
        lane=thread & (LANES - 1),
        piece=warp & (PIECES - 1),
        parity=warp // PIECES,
        rank=rank,
        batch=batch,
        first_tile=first_tile,
        tiles=(isa.constant(g.tiles + g.clusters - 1) - first_tile) // g.clusters,
        first_group=first_group,
        groups=(rank + 1) * g.groups // g.cluster - first_group,
        shared=isa.shared_address(refs.shared),
    )
