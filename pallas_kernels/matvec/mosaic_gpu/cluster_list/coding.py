"""Phase code: stores the codes of all activation rows at their positions in the list, and the records."""

import contextlib
from contextlib import AbstractContextManager

from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.cluster_list.geometry import (
    UNITS_BYTES,
    ClusterListGeometry,
)
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
    times_gain,
)
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import FACTOR_OFFSET, PEAK_OFFSET, TABLE_BYTES
from pallas_kernels.matvec.mosaic_gpu.shared_list.listing import Segment


def load_gains(isa: Instructions, g: ClusterListGeometry, refs: Refs) -> list[Value]:
    """Loads the level gains of levels 1 to P - 1.

    The loads are ordered, because the compiler would move them behind the list, where they take longer.
    """
    address = isa.global_address(refs.level_gains)
    return [isa.load_global(address + 4 * f, 1, "f32", ordered=True)[0] for f in range(g.planes - 1)]


def store_codes(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    segment: Segment,
    share: Share,
    listed: Listed,
    gains: list[Value],
) -> None:
    """Stores the codes of the warp's rows in its segment, and their records.

    The codes are those of the program for one row, with the same operations. A code that is not listed goes
    to a byte of the lane behind the list, which nothing reads, because conditions would take more
    instructions.
    """
    units = store_units(isa, g, context, segment, share, listed.placed.section, gains)
    exists = exists_of(isa, g, segment)
    first_row = context.shared + g.codes_base + share.part * (2 * g.codes_stride)
    unlisted = first_row + g.sections * g.section_capacity + segment.index * LANES + context.lane
    addresses = [
        [
            isa.select(is_listed, first_row + position, unlisted)
            for is_listed, position in zip(*plane, strict=True)
        ]
        for plane in zip(listed.listed, listed.positions, strict=True)
    ]
    for i, x in enumerate(share.x):
        distance = i * g.segment_parts * (2 * g.codes_stride)
        row_addresses = [[address + distance for address in plane] for plane in addresses]
        may_lack = (i + 1) * g.segment_parts > g.rows
        with when(isa, share.rows[i] < g.rows if may_lack else None):
            row = share.rows[i]
            total = store_row(isa, g, context, row, x, exists, gains, units, row_addresses)
            store_padding(isa, g, context, listed, first_row + distance)
            record = record_address(g, context, listed.placed.section, row)
            part = segment.index % g.segments_per_section
            isa.store_shared(record + (part << 2), [isa.reduce_add(total)], context.lane.equals(0))


def when(isa: Instructions, condition: Value | None) -> AbstractContextManager[None]:
    """Runs the body if the condition holds; always, if it is None."""
    return contextlib.nullcontext() if condition is None else isa.when(condition)


def store_units(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    segment: Segment,
    share: Share,
    section: Value,
    gains: list[Value],
) -> Value:
    """Stores the factors from activations to codes of all planes, and the peaks; each lane has one row.

    A peak is multiplied by the factor of the norm, and stored in the record of the section.

    Returns:
      Shared-memory address of the warp's factors of row 0.
    """
    row = context.lane
    units = context.shared + g.units_base + context.warp * (UNITS_BYTES * g.rows)
    with isa.when(row < g.rows):
        peak = load_peak(isa, g, context, section, row) * largest_gain(isa, gains)
        inverse_unit = isa.reciprocal(peak * (1.0 / PEAK_CODE))
        isa.store_shared(units + row * UNITS_BYTES, [inverse_unit * 4.0**-f for f in range(4)])
        if g.num_square_partials:
            table = context.shared + g.thresholds_base + row * TABLE_BYTES
            peak = peak * isa.load_shared(table + FACTOR_OFFSET, 1, "f32")[0]
        first_warp = (segment.index % g.segments_per_section).equals(0) & share.part.equals(0)
        isa.store_shared(record_address(g, context, section, row) + PEAK_OFFSET, [peak], first_warp)
    isa.warp_barrier()
    return units


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


def store_row(
    isa: Instructions,
    g: ClusterListGeometry,
    context: LaneContext,
    row: Value,
    x: list[Value],
    exists: list[Value] | None,
    gains: list[Value],
    units: Value,
    addresses: list[list[Value]],
) -> Value:
    """Stores the codes of one row at the addresses ``[plane][q]``; returns the sum of the lane's codes."""
    thresholds = load_thresholds(isa, g, context, row)
    factors = isa.load_shared(units + row * UNITS_BYTES, 4, "f32")
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
            store_code(isa, g, addresses[f][q], bits)
    return total


def store_code(
    isa: Instructions, g: ClusterListGeometry, address: Value, bits: Value, where: Value | None = None
) -> None:
    """Stores the high and the low byte of the code ``bits ^ LOW_SIGN``."""
    isa.store_shared_byte(address, bits >> 8, where)
    isa.store_shared_byte(address + g.codes_stride, bits ^ LOW_SIGN, where)


def store_padding(
    isa: Instructions, g: ClusterListGeometry, context: LaneContext, listed: Listed, codes: Value
) -> None:
    """Stores the codes 0 of one row in the padding of the segment's section, if the segment is its last."""
    placed, zero = listed.placed, isa.constant(ROUNDED_ZERO)
    for first in range(0, g.step_entries, LANES):
        position = placed.count + first + context.lane
        is_padding = placed.is_last & (position < placed.size)
        store_code(isa, g, codes + placed.base + position, zero, is_padding)


def record_address(g: ClusterListGeometry, context: LaneContext, section: Value, row: Value) -> Value:
    """Returns the shared-memory address of the record of a row in a section."""
    return context.shared + g.records_base + (section * g.rows + row) * TABLE_BYTES
