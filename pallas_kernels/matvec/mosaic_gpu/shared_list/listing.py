"""Phase list: lists the plane rows that the CTA reads, in the order of sections, planes and channels."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.listing import load_thresholds
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import (
    FACTOR_OFFSET,
    TABLE_BYTES,
    UNLISTED,
    SharedListGeometry,
)
from pallas_kernels.matvec.mosaic_gpu.shared_list.lane_context import (
    LaneContext,
    first_channel,
    group_of_section,
    load_x,
)


@dataclasses.dataclass(frozen=True)
class Segment:
    """The channels that the warp lists: ``segment_chunks`` chunks of 32, one channel of each for a lane."""

    index: Value
    """Index of the segment in the CTA; 0 if the warp has none."""
    exists: Value | None
    """Whether the warp has a segment; None if every warp has one."""
    channel: Value
    """The lane's first channel. The others follow at distances of 32."""


def segment_of(isa: Instructions, g: SharedListGeometry, context: LaneContext) -> Segment:
    """Returns the segment of the warp."""
    index, exists = context.warp, None
    if g.segments < g.warps:
        exists = context.warp < g.segments
        index = isa.select(exists, context.warp, isa.constant(0))
    channel = first_channel(g, context) + index * (LANES * g.segment_chunks) + context.lane
    return Segment(index, exists, channel)


def store_thresholds(isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext) -> None:
    """Stores the thresholds of each row, divided by the factor of its norm, and this factor.

    The rows are divided among the warps.
    """
    for first in range(0, g.rows, g.warps):
        row = context.warp + first
        with when_row(isa, g, row, first + g.warps):
            thresholds, factor = load_thresholds(isa, g, refs, row)
            address, stores = context.shared + g.thresholds_base + row * TABLE_BYTES, context.lane.equals(0)
            for f, threshold in enumerate(thresholds):
                isa.store_shared(address + 4 * f, [threshold], stores)
            if factor is not None:
                isa.store_shared(address + FACTOR_OFFSET, [factor], stores)


def when_row(isa: Instructions, g: SharedListGeometry, row: Value, end: int):
    """Runs the body if the activation row, which is less than ``end``, exists."""
    return isa.when(row < g.rows if end > g.rows else isa.constant(True, "bool"))


def load_row_x(isa: Instructions, g: SharedListGeometry, refs: Refs, segment: Segment) -> list[list[Value]]:
    """Loads f32 ``[row][q]``: the lane's activations in the segment."""
    return [
        [
            load_x(isa, g, refs, isa.constant(row), segment.channel + LANES * q)
            for q in range(g.segment_chunks)
        ]
        for row in range(g.rows)
    ]


def reach(
    isa: Instructions,
    g: SharedListGeometry,
    context: LaneContext,
    segment: Segment,
    x: list[list[Value]],
    plane: int,
) -> list[Value]:
    """Returns ballots ``[q]`` of the channels that some activation row reads in this plane."""
    table = context.shared + g.thresholds_base + 4 * plane
    any_row: list[Value] = []
    for row in range(g.rows):
        (threshold,) = isa.load_shared(table + TABLE_BYTES * row, 1, "f32")
        reached = [~(isa.absolute(v) < threshold) for v in x[row]]  # A NaN reaches every level.
        any_row = [a | b for a, b in zip(any_row, reached, strict=True)] if row else reached
    for q in range(g.segment_chunks):
        if g.has_padding:
            any_row[q] = any_row[q] & (segment.channel + LANES * q < g.in_features)
        if segment.exists is not None:
            any_row[q] = any_row[q] & segment.exists
    return [isa.ballot(condition) for condition in any_row]


def list_rows(isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext) -> Value:
    """Writes the list, the positions of the channels in it, and the sizes of the sections.

    Every section has at least one step, and is padded to whole steps.

    Returns:
      Number of steps of all sections.
    """
    segment = segment_of(isa, g, context)
    x = load_row_x(isa, g, refs, segment)
    store_thresholds(isa, g, refs, context)
    isa.block_barrier()
    ballots = [reach(isa, g, context, segment, x, plane) for plane in range(g.planes)]
    count = isa.constant(0)
    for plane in ballots:
        for ballot in plane:
            count = count + isa.count_bits(ballot)
    counts = context.shared + g.counts_base
    isa.store_shared(counts + (context.warp << 2), [count], context.lane.equals(0))
    isa.block_barrier()
    placed = place(isa, g, context, segment)
    store_entries(isa, g, context, segment, ballots, placed)
    store_padding(isa, g, context, segment, placed)
    isa.block_barrier()
    return placed.end // g.step_entries


@dataclasses.dataclass(frozen=True)
class Placed:
    """Place of the warp's segment in the list."""

    section: Value
    """Index of its section."""
    base: Value
    """Position of the section's first entry in the list."""
    first: Value
    """Position of the segment's first entry in its section."""
    count: Value
    """Number of entries of the section."""
    size: Value
    """Number of its entries with padding."""
    is_last: Value
    """Whether the segment exists and is the last of its section."""
    end: Value
    """Number of entries of all sections, with padding."""


def place(isa: Instructions, g: SharedListGeometry, context: LaneContext, segment: Segment) -> Placed:
    """Computes the place of the segment from the numbers of entries of all segments."""
    address = context.shared + g.counts_base
    counts = [c for i in range(0, g.warps, 4) for c in isa.load_shared(address + 4 * i, 4)]
    section, part = segment.index // g.segments_per_section, segment.index % g.segments_per_section
    zero = isa.constant(0)
    base, first, count, size, end = zero, zero, zero, zero, zero
    for u in range(g.sections):
        mine = section.equals(u)
        own = counts[u * g.segments_per_section : (u + 1) * g.segments_per_section]
        section_count = own[0] if len(own) == 1 else own[0] + own[1]
        section_size = (section_count + (g.step_entries - 1)) & -g.step_entries
        section_size = isa.select(section_count.equals(0), isa.constant(g.step_entries), section_size)
        base = isa.select(mine, end, base)
        count = isa.select(mine, section_count, count)
        size = isa.select(mine, section_size, size)
        if len(own) > 1:
            first = isa.select(mine & part.equals(1), own[0], first)
        end = end + section_size
    is_last = part.equals(g.segments_per_section - 1)
    if segment.exists is not None:
        is_last = is_last & segment.exists
    return Placed(section, base, first, count, size, is_last, end)


def store_entries(
    isa: Instructions,
    g: SharedListGeometry,
    context: LaneContext,
    segment: Segment,
    ballots: list[list[Value]],
    placed: Placed,
) -> None:
    """Stores the offsets of the segment's plane rows, and the positions of its channels in their section."""
    lower, unlisted, one = isa.lower_lanes(), isa.constant(UNLISTED), isa.constant(1)
    list_of_section = context.shared + (placed.base << 2)
    plane_row = segment.channel * g.stored_row_bytes + context.tile * ROW_BYTES
    first = placed.first
    positions: list[list[Value]] = [[] for _ in range(g.segment_chunks)]
    for f, plane in enumerate(ballots):
        for q, ballot in enumerate(plane):
            listed = ((ballot >> context.lane) & one).equals(1)
            position = first + isa.count_bits(ballot & lower)
            first = first + isa.count_bits(ballot)
            offset = plane_row + (f * g.plane_bytes + q * LANES * g.stored_row_bytes)
            isa.store_shared(list_of_section + (position << 2), [offset], listed)
            positions[q].append(isa.select(listed, position, unlisted))
    for q, numbers in enumerate(positions):
        numbers = numbers + [unlisted] * (len(numbers) % 2)
        words = [low | (high << 16) for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
        channel = segment.index * (LANES * g.segment_chunks) + context.lane + LANES * q
        address = context.shared + g.positions_base + channel * (4 * g.position_words)
        isa.store_shared(address, words, segment.exists)


def store_padding(
    isa: Instructions, g: SharedListGeometry, context: LaneContext, segment: Segment, placed: Placed
) -> None:
    """Pads the section's last step with entries for the first plane row of its group; stores its sizes."""
    group = group_of_section(isa, g, context, placed.section)
    offset = group * (layout.GROUP * g.stored_row_bytes) + context.tile * ROW_BYTES
    for first in range(0, g.step_entries, LANES):
        position = placed.count + first + context.lane
        address = context.shared + ((placed.base + position) << 2)
        isa.store_shared(address, [offset], placed.is_last & (position < placed.size))
    sizes = context.shared + g.sections_base + (placed.section << 3)
    isa.store_shared(sizes, [placed.count, placed.size], placed.is_last & context.lane.equals(0))
