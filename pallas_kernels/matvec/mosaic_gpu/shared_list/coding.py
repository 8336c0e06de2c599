"""Phase code: stores the 16-bit codes of a section's activations, at their positions in the list."""

import dataclasses

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
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


def store_codes(
    isa: Instructions, g: SharedListGeometry, refs: Refs, context: LaneContext, section: Value
) -> None:
    """Stores the codes of all activation rows, and their records: sums of codes and peaks.

    ``warps_per_row`` warps share a row. Each warp stores the codes of ``section_chunks / warps_per_row``
    chunks, but loads all activations of the section to find their peak.
    """
    part = context.warp % g.warps_per_row
    rows = [context.warp // g.warps_per_row + first for first in range(0, g.rows, g.rows_at_once)]
    if g.rows % g.rows_at_once == 0:  # One pass over the positions serves all rows of the warp.
        store_row_codes(isa, g, refs, context, section, rows, part)
    else:
        for row in rows:
            with isa.when(row < g.rows):
                store_row_codes(isa, g, refs, context, section, [row], part)


def store_row_codes(
    isa: Instructions,
    g: SharedListGeometry,
    refs: Refs,
    context: LaneContext,
    section: Value,
    rows: list[Value],
    part: Value,
) -> None:
    """Stores the codes of activation rows in the warp's chunks, and their records."""
    chunks = g.section_chunks // g.warps_per_row
    channel_of_section = []  # The warp's chunks come first.
    for j in range(g.section_chunks):
        chunk = (part * chunks + j) % g.section_chunks if g.warps_per_row > 1 else isa.constant(j)
        channel_of_section.append(chunk * LANES + context.lane)
    channel = [first_channel(g, context) + section * g.section_channels + c for c in channel_of_section]
    gains = load_by_plane(isa, g, isa.global_address(refs.level_gains))[:-1]
    coders = [Coder.create(isa, g, refs, context, row, channel, gains, chunks) for row in rows]
    for j in range(chunks):
        index = section * g.section_channels + channel_of_section[j]
        words = isa.load_shared(
            context.shared + g.positions_base + index * (4 * g.position_words), g.position_words
        )
        positions = [words[f // 2] >> 16 if f % 2 else words[f // 2] & UNLISTED for f in range(g.planes)]
        listed = [position < UNLISTED for position in positions]
        exists = channel[j] < g.in_features if g.has_padding else None
        for coder in coders:
            coder.store_channel(isa, g, j, exists, gains, positions, listed)
    count, size = isa.load_shared(context.shared + g.sections_base + (section << 3), 2)
    for coder in coders:
        for first in range(0, g.step_entries, LANES):
            position = count + first + context.lane
            coder.store(isa, g, position, isa.constant(LOW_SIGN), (position < size) & part.equals(0))
        coder.store_record(isa, g, context, part)


@dataclasses.dataclass
class Coder:
    """Computes the codes of one activation row in one section."""

    row: Value
    """Index of the row."""
    x: list[Value]
    """The lane's activations in the section, f32."""
    thresholds: list[Value]
    """Thresholds of levels ``1..P``, f32."""
    peak: Value
    """Largest ``|x|`` of the section times the largest gain, f32."""
    inverse_unit: Value
    """1 / (unit of the codes), f32."""
    codes: Value
    """Shared-memory address of the high bytes of the row."""
    total: Value
    """Sum of the codes so far."""

    @classmethod
    def create(
        cls,
        isa: Instructions,
        g: SharedListGeometry,
        refs: Refs,
        context: LaneContext,
        row: Value,
        channel: list[Value],
        gains: list[Value],
        chunks: int,
    ) -> "Coder":
        """Loads the row's activations and thresholds; ``chunks`` is the number of chunks to code."""
        x = [load_x(isa, g, refs, row, c) for c in channel]
        table = context.shared + g.thresholds_base + row * TABLE_BYTES
        thresholds = [isa.load_shared(table + 4 * f, 1, "f32")[0] for f in range(g.planes)]
        peak = largest_activation(isa, x) * largest_gain(isa, gains)
        return cls(
            row=row,
            x=x,
            thresholds=thresholds,
            peak=peak,
            inverse_unit=isa.reciprocal(peak * (1.0 / PEAK_CODE)),
            codes=context.shared + g.codes_base + row * (2 * g.codes_stride),
            total=isa.constant(-ROUNDED_ZERO * g.planes * chunks),
        )

    def store_channel(
        self,
        isa: Instructions,
        g: SharedListGeometry,
        j: int,
        exists: Value | None,
        gains: list[Value],
        positions: list[Value],
        listed: list[Value],
    ) -> None:
        """Stores the codes of the lane's channel ``j`` at its ``positions`` in the planes that are listed."""
        reached = [~(isa.absolute(self.x[j]) < t) for t in self.thresholds]
        if exists is not None:
            reached = [reaches & exists for reaches in reached]
        scaled = times_gain(isa, self.x[j], reached, gains)
        rounding, rounded_zero = isa.constant(ROUNDING, "f32"), isa.constant(ROUNDED_ZERO)
        for f in range(g.planes):
            rounded = isa.multiply_add(scaled, self.inverse_unit * 4.0**-f, rounding)
            bits = isa.select(reached[f], isa.float_to_bits(rounded), rounded_zero)
            self.total = self.total + bits
            self.store(isa, g, positions[f], bits, listed[f])

    def store(
        self, isa: Instructions, g: SharedListGeometry, position: Value, bits: Value, where: Value
    ) -> None:
        """Stores the high and the low byte of the code ``bits ^ LOW_SIGN``."""
        isa.store_shared_byte(self.codes + position, bits >> 8, where)
        isa.store_shared_byte(self.codes + position + g.codes_stride, bits ^ LOW_SIGN, where)

    def store_record(
        self, isa: Instructions, g: SharedListGeometry, context: LaneContext, part: Value
    ) -> None:
        """Stores the sum of codes of the warp's chunks, and the peak times the factor of the norm."""
        record = context.shared + g.records_base + self.row * TABLE_BYTES
        total, peak = isa.reduce_add(self.total), self.peak
        isa.store_shared(record + (part << 2), [total], context.lane.equals(0))
        if g.num_square_partials:
            table = context.shared + g.thresholds_base + self.row * TABLE_BYTES
            peak = peak * isa.load_shared(table + FACTOR_OFFSET, 1, "f32")[0]
        isa.store_shared(record + PEAK_OFFSET, [peak], context.lane.equals(0) & part.equals(0))
