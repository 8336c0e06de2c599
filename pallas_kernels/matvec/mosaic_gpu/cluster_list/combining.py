"""Phases combine and reduce: from the integer sums of a section to the partial sums of the cluster."""

import contextlib

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.cluster_list.coding import record_address
from pallas_kernels.matvec.mosaic_gpu.cluster_list.geometry import (
    CHUNK_SCALES_BYTES,
    OUTPUT_BYTES,
    ClusterListGeometry,
)
from pallas_kernels.matvec.mosaic_gpu.cluster_list.lane_context import LaneContext
from pallas_kernels.matvec.mosaic_gpu.lane_context import COPY_BYTES, Refs
from pallas_kernels.matvec.mosaic_gpu.reduction import Conversion
from pallas_kernels.matvec.mosaic_gpu.shared_list.combining import exist_all, first_output, has_piece, row_of
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import PEAK_OFFSET
from pallas_kernels.matvec.mosaic_gpu.shared_list.lane_context import stored_group
from pallas_kernels.matvec.mosaic_gpu.shared_list.streaming import accumulator
from pallas_kernels.matvec.mosaic_gpu.tile import chunk_outputs


def copy_scales(isa: Instructions, g: ClusterListGeometry, refs: Refs, context: LaneContext) -> None:
    """Starts copying the scales that ``reduce`` needs; they join the copy group of the first step.

    The end of the program would wait for loads from global memory. With several CTAs in a cluster, a CTA adds
    vectors of one parity (``reduce``), so it needs two of the four chunks of the tile, in all groups of the
    cluster.
    """
    groups, each = g.config.groups_per_cta, CHUNK_SCALES_BYTES // COPY_BYTES
    copies = groups * g.tiles_per_cta * g.group_chunks * each
    size = chunk_outputs(context.pieces) * 2
    for first in range(0, copies, g.threads):
        index = context.thread + first
        slot, offset = index // each, (index % each) << 4
        chunk, tile, group = slot % g.group_chunks, context.tile, slot // (g.group_chunks * g.tiles_per_cta)
        if g.tiles_per_cta > 1:
            tile = tile + slot // g.group_chunks % g.tiles_per_cta
        if g.cluster > 1:
            chunk = (chunk << 1) + (context.rank & 1)
        stored = stored_group(isa, g, context.partial * groups + group)
        source = ((stored * g.stored_n + tile * layout.TILE) << 1) + chunk * size + offset
        copying = isa.constant(True, "bool") if first + g.threads <= copies else index < copies
        if context.pieces is not None:
            copying = copying & (offset < size)
        with isa.when(copying):
            target = context.shared + g.scales_base + (index << 4)
            isa.copy_async(target, isa.global_address(refs.scales) + isa.widen(source), evict_first=True)


def combine(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    section: Value,
    pass_index: Value,
    accumulators: list[Value],
) -> None:
    """Converts the sums of a pass to float32 and stores them in the shared memory of the CTA.

    The lane has the activation rows ``4 t + column``. The operations are those of ``reduction.combine``.
    """
    outputs = context.shared + g.outputs_base + pass_index * g.section_bytes + (context.thread << 4)
    for t in range(g.row_tiles):
        row = row_of(context, t)
        if not exist_all(g, t):
            row = isa.select(row < g.rows, row, isa.constant(0))
        record = record_address(g, context, section, row)
        sum_of_codes, *others = isa.load_shared(record, g.segments_per_section)
        for other in others:
            sum_of_codes = sum_of_codes + other
        (peak,) = isa.load_shared(record + PEAK_OFFSET, 1, "f32")
        conversion = Conversion.create(isa, sum_of_codes, peak)
        for piece in range(g.pieces):
            first = accumulator(g, piece, t, 0)
            even, odd = [
                conversion.outputs(isa, [accumulators[first + 4 * p + 2 * i :][:2] for p in range(4)])
                for i in range(2)
            ]
            for half in range(2):
                index = 2 * (g.pieces * t + piece) + half
                vector = [even[2 * half], odd[2 * half], even[2 * half + 1], odd[2 * half + 1]]
                isa.store_shared(outputs + index * g.vector_bytes, vector)


def reduce(isa: Instructions, g: ClusterListGeometry, refs: Refs, context: LaneContext) -> None:
    """Scales the outputs of all sections of the cluster, adds them in their order, and stores the sums.

    The CTA of rank ``i`` has the vectors ``i, i + ctas, ..`` of every thread over all tiles, see ``combine``.
    Each thread reads what the thread of the same index in each CTA has stored.
    """
    if g.cluster > 1:
        isa.cluster_barrier()
    vectors = g.tiles_per_cta * g.output_vectors
    for first in range(0, vectors, g.cluster):
        index = context.rank + first if g.cluster > 1 else isa.constant(first)
        exists = index < vectors if first + g.cluster > vectors else None
        tile, vector = isa.constant(0), index
        if g.tiles_per_cta > 1:
            tile, vector = index // g.output_vectors, index % g.output_vectors
        with when_all(isa, has_piece(g, context, piece_of(g, vector)), exists):
            add_sections(isa, g, refs, context, tile, vector)
    if g.cluster > 1:
        isa.cluster_barrier(ordered=False)  # A CTA must not end while others read its shared memory.


def piece_of(g: ClusterListGeometry, vector: Value) -> Value | int:
    """Returns the piece of the warp that a vector of outputs belongs to."""
    return (vector >> 1) % g.pieces if g.pieces > 1 else 0


def when_all(isa: Instructions, *conditions: Value | None):
    """Runs the body if all conditions hold that are not None."""
    holds = None
    for condition in conditions:
        if condition is not None:
            holds = condition if holds is None else holds & condition
    return contextlib.nullcontext() if holds is None else isa.when(holds)


def add_sections(
    isa: Instructions, g: ClusterListGeometry, refs: Refs, context: LaneContext, tile: Value, vector: Value
) -> None:
    """Adds one vector of four outputs over the sections of the cluster, and stores the sums.

    ``tile`` is the index of the tile in the CTA, ``vector`` that of the vector in the tile.

    The operations are those of ``reduction.reduce``, in the same order.
    """
    row_tile, piece, half = vector // (2 * g.pieces), piece_of(g, vector), vector & 1
    output = first_output(isa, g, context, piece) + half * chunk_outputs(context.pieces)
    outputs = context.shared + g.outputs_base + (context.thread << 4) + vector * g.vector_bytes
    outputs = outputs + tile * (g.sections * g.section_bytes)
    lane_row = context.lane >> 2
    slot, in_chunk = lane_row >> 2, ((context.warp * g.pieces + piece) << 4) + ((lane_row & 3) << 2)
    if g.cluster == 1:
        slot = (slot << 1) + half
    chunk = tile * g.group_chunks + slot
    scales_address = context.shared + g.scales_base + chunk * CHUNK_SCALES_BYTES + (in_chunk << 1)
    group_bytes = g.tiles_per_cta * g.group_chunks * CHUNK_SCALES_BYTES
    totals: list[Value] = []
    scales: list[Value] = []
    for u in range(g.config.warps):
        rank, section = divmod(u, g.sections)
        address = outputs + section * g.section_bytes
        values = (
            isa.load_cluster(address, rank, OUTPUT_BYTES // 4, "f32")
            if g.cluster > 1
            else isa.load_shared(address, OUTPUT_BYTES // 4, "f32")
        )
        group, part = divmod(u, g.config.warps_per_group)
        if part == 0:
            words = isa.load_shared(scales_address + group * group_bytes, 2)
            scales = [isa.half_to_float(word, end) for word in words for end in ("low", "high")]
        if not totals:
            totals = [v * s for v, s in zip(values, scales, strict=True)]
        else:
            terms = zip(values, scales, totals, strict=True)
            totals = [isa.multiply_add(v, s, total) for v, s, total in terms]
    row = row_of(context, 0) + (row_tile << 2)
    exists = isa.constant(True, "bool") if g.rows % 4 == 0 else row < g.rows
    with isa.when(exists):
        first = (context.partial * g.rows + row) * g.stored_n + (context.tile + tile) * layout.TILE + output
        isa.store_global(isa.global_address(refs.partials) + (isa.widen(first) << 2), totals)
