"""Phase code: the 16-bit codes of a section's activations, at the positions of the list."""

from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.listing import (
    LOW_SIGN,
    PEAK_CODE,
    ROUNDED_ZERO,
    ROUNDING,
    largest_activation,
    largest_gain,
    load_by_plane,
    times_gain,
)
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import (
    FACTOR_OFFSET,
    PEAK_OFFSET,
    TABLE_BYTES,
    UNLISTED,
    SharedListGeometry,
)
from pallas_kernels.matvec.mosaic_gpu.shared_list.lane_context import LaneContext, first_channel, load_x
from pallas_kernels.matvec.mosaic_gpu.shared_list.listing import when_row


def store_codes(
    isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext, section: Value
) -> None:
    """Stores the codes of all activation rows, and their records: sums of codes and peaks.

    ``warps_per_row`` warps share a row. Each codes ``section_chunks / warps_per_row`` chunks, but loads all
    activations of the section for their peak.
    """
    part = context.warp % g.warps_per_row
    for first in range(0, g.rows, g.rows_at_once):
        row = context.warp // g.warps_per_row + first
        with when_row(isa, g, row, first + g.rows_at_once):
            store_row_codes(isa, g, refs, context, section, row, part)


def store_row_codes(
    isa: Instructions,
    g: SharedListGeometry,
    refs: Refs,
    context: LaneContext,
    section: Value,
    row: Value,
    part: Value,
) -> None:
    """Stores the codes of one activation row in the warp's chunks, and its record."""
    chunks = g.section_chunks // g.warps_per_row
    channel_of_section = []  # The warp's chunks come first.
    for j in range(g.section_chunks):
        chunk = (part * chunks + j) % g.section_chunks if g.warps_per_row > 1 else isa.constant(j)
        channel_of_section.append(chunk * LANES + context.lane)
    channel = [first_channel(g, context) + section * g.section_channels + c for c in channel_of_section]
    x = [load_x(isa, g, refs, row, c) for c in channel]
    gains = load_by_plane(isa, g, isa.global_address(refs.level_gains))[:-1]
    table = context.shared + g.thresholds_base + row * TABLE_BYTES
    thresholds = [isa.load_shared(table + 4 * f, 1, "f32")[0] for f in range(g.planes)]
    peak = largest_activation(isa, x) * largest_gain(isa, gains)
    inverse_unit = isa.reciprocal(peak * (1.0 / PEAK_CODE))

    codes = context.shared + g.codes_base + row * (2 * g.codes_stride)
    rounding, rounded_zero = isa.constant(ROUNDING, "f32"), isa.constant(ROUNDED_ZERO)
    total = isa.constant(-ROUNDED_ZERO * g.planes * chunks)
    for j in range(chunks):
        reached = [~(isa.absolute(x[j]) < t) for t in thresholds]
        if g.has_padding:
            reached = [passed & (channel[j] < g.in_features) for passed in reached]
        scaled = times_gain(isa, x[j], reached, gains)
        index = section * g.section_channels + channel_of_section[j]
        words = isa.load_shared(
            context.shared + g.positions_base + index * (4 * g.position_words), g.position_words
        )
        for f in range(g.planes):
            rounded = isa.multiply_add(scaled, inverse_unit * 4.0**-f, rounding)
            bits = isa.select(reached[f], isa.float_to_bits(rounded), rounded_zero)
            total = total + bits
            position = words[f // 2] >> 16 if f % 2 else words[f // 2] & UNLISTED
            listed = position < UNLISTED
            isa.store_shared_byte(codes + position, bits >> 8, listed)
            isa.store_shared_byte(codes + position + g.codes_stride, bits ^ LOW_SIGN, listed)
    count, size = isa.load_shared(context.shared + g.sections_base + (section << 3), 2)
    for first in range(0, g.step_entries, LANES):
        position, zero = count + first + context.lane, isa.constant(0)
        padding = (position < size) & part.equals(0)
        isa.store_shared_byte(codes + position, zero, padding)
        isa.store_shared_byte(codes + position + g.codes_stride, zero, padding)

    record = context.shared + g.records_base + row * TABLE_BYTES
    total = isa.reduce_add(total)
    isa.store_shared(record + (part << 2), [total], context.lane.equals(0))
    if g.num_square_partials:
        peak = peak * isa.load_shared(table + FACTOR_OFFSET, 1, "f32")[0]
    isa.store_shared(record + PEAK_OFFSET, [peak], context.lane.equals(0) & part.equals(0))
