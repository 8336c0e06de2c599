"""Phase list: lists the plane rows that the CTA reads, in the order of sections, planes and channels."""

import dataclasses

from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.cluster_list.geometry import (
    BALLOTS_BYTES,
    ClusterListGeometry,
    chunks_of_segment,
)
from pallas_kernels.matvec.mosaic_gpu.cluster_list.lane_context import LaneContext
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import TABLE_BYTES
from pallas_kernels.matvec.mosaic_gpu.shared_list.lane_context import first_channel, load_x
from pallas_kernels.matvec.mosaic_gpu.shared_list.listing import (
    Placed,
    Segment,
    store_padding,
    store_thresholds,
)


@dataclasses.dataclass(frozen=True)
class Share:
    """The activation rows of a segment that the warp grades, and whose codes it computes."""

    part: Value
    """Index of the warp among those of the segment. Its rows are ``part, part + segment_parts, ..``."""
    rows: list[Value]
    """Indices of the rows. The last may not exist."""
    sources: list[Value]
    """Indices of the rows, 0 instead of one that does not exist."""
    x: list[list[Value]]
    """f32 ``[row][q]``: their activations in the lane's channels."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """Entries of the lane's channels in the list of the CTA."""

    listed: list[list[Value]]
    """bool ``[plane][q]``: whether some activation row reads the plane row."""
    positions: list[list[Value]]
    """i32 ``[plane][q]``: position of the entry in the list of a tile."""
    placed: Placed
    """Place of the segment in the list."""
    list_steps: Value
    """Number of steps of all sections in one tile; all lanes of the CTA have the same."""


def segment_of(g: ClusterListGeometry, context: LaneContext) -> Segment:
    """Returns the segment of the warp. ``segment_parts`` warps share a segment."""
    index = context.warp % g.segments
    channel = first_channel(g, context) + index * (LANES * g.segment_chunks) + context.lane
    return Segment(index, None, channel)


def share_of(
    isa: Instructions, g: ClusterListGeometry, refs: Refs, context: LaneContext, segment: Segment
) -> Share:
    """Loads the warp's share of a segment."""
    part = context.warp // g.segments
    firsts = range(0, g.rows, g.segment_parts)
    rows = [part + first if g.segment_parts > 1 else isa.constant(first) for first in firsts]
    # A row that does not exist has the activations of row 0.
    sources = [
        isa.select(row < g.rows, row, isa.constant(0)) if first + g.segment_parts > g.rows else row
        for row, first in zip(rows, firsts, strict=True)
    ]
    x = [
        [load_x(isa, g, refs, source, segment.channel + q) for q in chunks_of_segment(g)]
        for source in sources
    ]
    return Share(part, rows, sources, x)


def load_thresholds(
    isa: Instructions, g: ClusterListGeometry, context: LaneContext, row: Value
) -> list[Value]:
    """Loads the thresholds of one row from shared memory, f32 ``[plane]``."""
    address = context.shared + g.thresholds_base + row * TABLE_BYTES
    thresholds = isa.load_shared(address, 2 if g.planes == 3 else g.planes, "f32")
    return thresholds if g.planes != 3 else thresholds + isa.load_shared(address + 8, 1, "f32")


def exists_of(isa: Instructions, g: ClusterListGeometry, segment: Segment) -> list[Value] | None:
    """Returns bool ``[q]``: whether the lane's channels exist; None without padding."""
    return [segment.channel + q < g.in_features for q in chunks_of_segment(g)] if g.has_padding else None


def reach(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    share: Share,
    exists: list[Value] | None,
) -> list[list[Value]]:
    """Returns bool ``[plane][q]``: whether some row of the share reads the plane row of the channel.

    A row that does not exist reads what row 0 reads.
    """
    reached: list[list[Value]] = []
    for row, x in zip(share.sources, share.x, strict=True):
        thresholds = load_thresholds(isa, g, context, row)
        # Not |x| >= t, because a NaN must reach every level.
        magnitudes = [isa.absolute(v) for v in x]
        mine = [[~(v < t) for v in magnitudes] for t in thresholds]
        if reached:
            mine = [[a | b for a, b in zip(*both, strict=True)] for both in zip(reached, mine, strict=True)]
        reached = mine
    if exists is not None:
        reached = [[r & e for r, e in zip(plane, exists, strict=True)] for plane in reached]
    return reached


def join_ballots(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    segment: Segment,
    part: Value,
    ballots: list[list[Value]],
) -> list[list[Value]]:
    """Returns the ballots ``[plane][0]`` over the rows of all warps of the segment."""
    own = [plane[0] for plane in ballots]
    width = 4 if g.planes == 3 else g.planes  # A vector of three words does not exist.
    words = own + [isa.constant(0)] * (width - g.planes)
    first = context.shared + g.ballots_base + segment.index * (BALLOTS_BYTES * g.segment_parts)
    isa.store_shared(first + part * BALLOTS_BYTES, words, context.lane.equals(0))
    isa.block_barrier()
    joined: list[Value] = []
    for i in range(g.segment_parts):
        loaded = isa.load_shared(first + i * BALLOTS_BYTES, width)
        joined = [a | b for a, b in zip(joined, loaded, strict=True)] if joined else loaded
    return [[ballot] for ballot in joined[: g.planes]]


def list_rows(
    isa: Instructions,
    g: ClusterListGeometry,
    refs: Refs,
    context: LaneContext,
    segment: Segment,
) -> tuple[Share, Listed]:
    """Writes the list of each tile, the sizes of the sections, and the peaks of the segments.

    Lists of tiles follow each other, so the steps of all tiles have one numbering. Every section has at least
    one step, and is padded to whole steps.
    """
    share = share_of(isa, g, refs, context, segment)
    store_thresholds(isa, g, refs, context)
    isa.block_barrier()
    listed = reach(isa, g, context, share, exists_of(isa, g, segment))
    ballots = [[isa.ballot(condition) for condition in plane] for plane in listed]
    if g.segment_parts > 1:  # Then a segment has one chunk.
        ballots = join_ballots(isa, g, context, segment, share.part, ballots)
        one = isa.constant(1)
        listed = [[((ballot >> context.lane) & one).equals(1) for ballot in plane] for plane in ballots]
    count = isa.constant(0)
    for ballot in (ballot for plane in ballots for ballot in plane):
        count = count + isa.count_bits(ballot)
    first_part = share.part.equals(0)
    counts = context.shared + g.counts_base + (segment.index << 2)
    isa.store_shared(counts, [count], context.lane.equals(0) & first_part)
    store_peaks(isa, g, context, segment, share)
    isa.block_barrier()
    placed = place(isa, g, context, segment)
    positions = store_entries(isa, g, context, segment, listed, ballots, placed, first_part)
    for t in range(g.tiles_per_cta):
        padding = dataclasses.replace(
            placed, is_last=placed.is_last & first_part, base=placed.base + placed.end * t
        )
        store_padding(isa, g, dataclasses.replace(context, tile=context.tile + t), segment, padding)
    isa.block_barrier()
    list_steps = isa.reduce_max(placed.end // g.step_entries)
    return share, Listed(listed, positions, placed, list_steps)


def store_peaks(
    isa: Instructions, g: ClusterListGeometry, context: LaneContext, segment: Segment, share: Share
) -> None:
    """Stores the bits of the largest ``|x|`` in the segment, for the rows of the share."""
    for i, x in enumerate(share.x):
        bits = [isa.float_to_bits(isa.absolute(v)) for v in x]
        peak = bits[0]
        for other in bits[1:]:
            peak = isa.maximum(peak, other)
        address = context.shared + g.peaks_base + (segment.index << 2) + share.rows[i] * (4 * g.warps)
        stores = context.lane.equals(0)
        if (i + 1) * g.segment_parts > g.rows:
            stores = stores & (share.rows[i] < g.rows)
        isa.store_shared(address, [isa.reduce_max(peak)], stores)


def place(isa: Instructions, g: ClusterListGeometry, context: LaneContext, segment: Segment) -> Placed:
    """Computes the place of the segment from the numbers of entries of all segments."""
    address, width = context.shared + g.counts_base, min(4, g.segments)
    counts = [c for i in range(0, g.segments, width) for c in isa.load_shared(address + 4 * i, width)]
    each = g.segments_per_section
    section, part = segment.index // each, segment.index % each
    zero = isa.constant(0)
    base, first, count, size, end = zero, zero, zero, zero, zero
    for u in range(g.sections):
        mine = section.equals(u)
        own = counts[u * each : (u + 1) * each]
        section_count = zero
        for i, segment_count in enumerate(own):
            first = isa.select(mine & part.equals(i), section_count, first)
            section_count = section_count + segment_count
        section_size = (section_count + (g.step_entries - 1)) & -g.step_entries
        section_size = isa.select(section_count.equals(0), isa.constant(g.step_entries), section_size)
        base = isa.select(mine, end, base)
        count = isa.select(mine, section_count, count)
        size = isa.select(mine, section_size, size)
        end = end + section_size
    return Placed(section, base, first, count, size, part.equals(each - 1), end)


def store_entries(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    segment: Segment,
    listed: list[list[Value]],
    ballots: list[list[Value]],
    placed: Placed,
    stores: Value,
) -> list[list[Value]]:
    """Stores the offsets of the segment's plane rows, and returns their positions in the list of a tile."""
    lower = isa.lower_lanes()
    plane_row = segment.channel * g.stored_row_bytes + context.tile * ROW_BYTES
    first = placed.base + placed.first
    positions: list[list[Value]] = []
    for f, plane in enumerate(ballots):
        positions.append([])
        for q, ballot in enumerate(plane):
            position = first + isa.count_bits(ballot & lower)
            first = first + isa.count_bits(ballot)
            offset = plane_row + (f * g.plane_bytes + q * LANES * g.stored_row_bytes)
            for t in range(g.tiles_per_cta):
                address = context.shared + ((position + placed.end * t) << 2)
                isa.store_shared(address, [offset + t * ROW_BYTES], listed[f][q] & stores)
            positions[-1].append(position)
    return positions
