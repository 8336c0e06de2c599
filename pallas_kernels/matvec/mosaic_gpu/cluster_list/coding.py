"""Phase code: stores the codes of all activation rows at their positions in the list, and the records."""

import contextlib
from contextlib import AbstractContextManager

from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.cluster_list.geometry import ClusterListGeometry
from pallas_kernels.matvec.mosaic_gpu.cluster_list.lane_context import LaneContext
from pallas_kernels.matvec.mosaic_gpu.cluster_list.listing import Listed, Share, exists_of, load_thresholds
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.listing import (
    LOW_SIGN,
    PEAK_CODE,
    ROUNDED_ZERO,
    ROUNDING,
    SMALLEST_PEAK_BITS,
    largest_gain,
    load_by_plane,
    times_gain,
)
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import FACTOR_OFFSET, PEAK_OFFSET, TABLE_BYTES
from pallas_kernels.matvec.mosaic_gpu.shared_list.listing import Segment


def store_codes(
    isa: Instructions,
    g: ClusterListGeometry,
    refs: Refs,
    context: LaneContext,
    segment: Segment,
    share: Share,
    listed: Listed,
) -> None:
    """Stores the codes of the warp's rows in its segment, and their records.

    The codes are those of the program for one row, with the same operations.
    """
    gains = load_by_plane(isa, g, isa.global_address(refs.level_gains))[:-1]
    largest = largest_gain(isa, gains)
    exists = exists_of(isa, g, segment)
    for i, x in enumerate(share.x):
        may_lack = (i + 1) * g.segment_parts > g.rows
        with when(isa, share.rows[i] < g.rows if may_lack else None):
            store_row(isa, g, context, segment, share.rows[i], x, exists, gains, largest, listed)


def when(isa: Instructions, condition: Value | None) -> AbstractContextManager[None]:
    """Runs the body if the condition holds; always, if it is None."""
    return contextlib.nullcontext() if condition is None else isa.when(condition)


def store_row(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    segment: Segment,
    row: Value,
    x: list[Value],
    exists: list[Value] | None,
    gains: list[Value],
    largest: Value,
    listed: Listed,
) -> None:
    """Stores the codes of one row in the segment, zeros in the padding of its section, and the record."""
    peak = load_peak(isa, g, context, listed.placed.section, row) * largest
    thresholds = load_thresholds(isa, g, context, row)
    inverse_unit = isa.reciprocal(peak * (1.0 / PEAK_CODE))
    factors = [inverse_unit * 4.0**-f for f in range(g.planes)]
    codes = context.shared + g.codes_base + row * (2 * g.codes_stride)
    rounding, rounded_zero = isa.constant(ROUNDING, "f32"), isa.constant(ROUNDED_ZERO)
    total = isa.constant(-ROUNDED_ZERO * g.planes * g.segment_chunks)
    for q, number in enumerate(x):
        magnitude = isa.absolute(number)
        reached = [~(magnitude < t) for t in thresholds]
        if exists is not None:
            reached = [reaches & exists[q] for reaches in reached]
        scaled = times_gain(isa, number, reached, gains)
        for f in range(g.planes):
            rounded = isa.multiply_add(scaled, factors[f], rounding)
            bits = isa.select(reached[f], isa.float_to_bits(rounded), rounded_zero)
            total = total + bits
            store_code(isa, g, codes + listed.positions[f][q], bits, listed.listed[f][q])
    placed = listed.placed
    for first in range(0, g.step_entries, LANES):
        position = placed.count + first + context.lane
        is_padding = placed.is_last & (position < placed.size)
        store_code(isa, g, codes + placed.base + position, rounded_zero, is_padding)
    store_record(isa, g, context, segment, placed.section, row, total, peak)


def load_peak(
    isa: Instructions, g: ClusterListGeometry, context: LaneContext, section: Value, row: Value
) -> Value:
    """Returns the largest ``|x|`` of a row in a section, as ``listing.largest_activation`` does."""
    each = g.segments_per_section
    address = context.shared + g.peaks_base + row * (4 * g.warps) + section * (4 * each)
    peak = isa.constant(SMALLEST_PEAK_BITS)
    for bits in isa.load_shared(address, each):
        peak = isa.maximum(peak, bits)
    return isa.bits_to_float(peak)


def store_code(isa: Instructions, g: ClusterListGeometry, address: Value, bits: Value, where: Value) -> None:
    """Stores the high and the low byte of the code ``bits ^ LOW_SIGN``."""
    isa.store_shared_byte(address, bits >> 8, where)
    isa.store_shared_byte(address + g.codes_stride, bits ^ LOW_SIGN, where)


def store_record(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    segment: Segment,
    section: Value,
    row: Value,
    total: Value,
    peak: Value,
) -> None:
    """Stores the sum of the segment's codes, and the peak of the section times the factor of the norm."""
    record = record_address(g, context, section, row)
    part, first_lane = segment.index % g.segments_per_section, context.lane.equals(0)
    isa.store_shared(record + (part << 2), [isa.reduce_add(total)], first_lane)
    if g.num_square_partials:
        table = context.shared + g.thresholds_base + row * TABLE_BYTES
        peak = peak * isa.load_shared(table + FACTOR_OFFSET, 1, "f32")[0]
    isa.store_shared(record + PEAK_OFFSET, [peak], first_lane & part.equals(0))


def record_address(g: ClusterListGeometry, context: LaneContext, section: Value, row: Value) -> Value:
    """Returns the shared-memory address of the record of a row in a section."""
    return context.shared + g.records_base + (section * g.rows + row) * TABLE_BYTES
