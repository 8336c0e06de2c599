"""Phase code: stores the codes of all activation rows, and marks the plane rows that some row reads."""

import dataclasses
import math
from collections.abc import Callable

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import (
    CHANNELS_PER_LANE,
    RECORD_BYTES,
    ROWS_PER_MATRIX,
    DenseRowsGeometry,
)
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import LaneContext, first_channel
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.listing import (
    LOW_SIGN,
    PEAK_CODE,
    ROUNDED_ZERO,
    ROUNDING,
    SMALLEST_PEAK_BITS,
    largest_gain,
    load_activation,
    load_by_plane,
    load_thresholds,
    times_gain,
)
from pallas_kernels.matvec.mosaic_gpu.reduction import midpoint_and_unit


@dataclasses.dataclass(frozen=True)
class Row:
    """An activation row that the warp codes."""

    index: Value
    """Index of the row, less than ``coded_rows``."""
    thresholds: list[Value]
    """Thresholds of levels ``1..P``, f32."""
    factor: Value | None
    """Factor of the norm, f32; None without a norm."""


@dataclasses.dataclass
class Coder:
    """Codes the groups of the CTA, in rounds. A warp codes one row in one group at a time."""

    isa: Instructions
    g: DenseRowsGeometry
    refs: Refs
    context: LaneContext
    rows: list[Row]
    gains: list[Value]
    where: Value | None
    """Whether the warp stores what it computes; None if all warps do."""
    first_group: Value
    """The warp's group in round 0."""
    x: list[list[list[Value]]]
    """The lane's activations, ``[round][row][4]``: up to 64 registers."""

    @classmethod
    def create(cls, isa: Instructions, g: DenseRowsGeometry, refs: Refs, context: LaneContext) -> "Coder":
        """Starts loading the activations and the thresholds."""
        coder_of_group = context.warp % min(g.coded_rows, g.warps)
        first_group = context.warp // min(g.coded_rows, g.warps)
        where = None
        if g.groups_at_once * g.coded_rows < g.warps:
            where = first_group < g.groups_at_once
            first_group = isa.select(where, first_group, isa.constant(0))
        indices = [coder_of_group + i * g.warps for i in range(g.rows_per_warp)]
        coder = cls(isa, g, refs, context, [], [], where, first_group, [])
        stored = [
            isa.select(row < g.rows, row, isa.constant(0)) if g.rows < g.coded_rows else row
            for row in indices
        ]
        coder.x = [[coder.load(row, coder.channel(turn)) for row in stored] for turn in range(g.rounds)]
        coder.rows = [
            Row(index, *load_thresholds(isa, g, refs, row))
            for index, row in zip(indices, stored, strict=True)
        ]
        coder.gains = load_by_plane(isa, g, isa.global_address(refs.level_gains))[:-1]
        return coder

    def group(self, turn: int) -> Value:
        """Returns the warp's group, of those of the CTA, in a round."""
        return self.first_group + turn * self.g.groups_at_once

    def channel(self, turn: int) -> Value:
        """Returns the lane's first channel in a round."""
        first = first_channel(self.g, self.context) + self.group(turn) * layout.GROUP
        return first + self.context.lane * CHANNELS_PER_LANE

    def load(self, row: Value, channel: Value) -> list[Value]:
        """Loads the lane's four activations, in one vector if every row is aligned; zeros in padding."""
        isa, g = self.isa, self.g
        x = isa.global_address(self.refs.x)
        zero = isa.constant(0.0, "f32")
        if g.in_features % CHANNELS_PER_LANE:
            values = []
            for i in range(CHANNELS_PER_LANE):
                exists = channel + i < g.in_features
                address = x + isa.widen((row * g.in_features + channel + i) * g.x_bytes)
                number = load_activation(isa, g, isa.select(exists, address, x))
                values.append(isa.select(exists, number, zero))
            return values
        address = x + isa.widen((row * g.in_features + channel) * g.x_bytes)
        if g.has_padding:
            address = isa.select(channel < g.in_features, address, x)
        if g.x_dtype == "float32":
            values = isa.load_global(address, 4, "f32", ordered=True)
        else:
            words = isa.load_global(address, 2, ordered=True)
            values = [unpacked(isa, g, word, half) for word in words for half in range(2)]
        if g.has_padding:
            values = [isa.select(channel < g.in_features, v, zero) for v in values]
        return values

    def code(self, rounds: range) -> None:
        """Codes the groups of some rounds."""
        for turn in rounds:
            for row, x in zip(self.rows, self.x[turn], strict=True):
                self.store_codes(row, turn, x)

    def store_codes(self, row: Row, turn: int, x: list[Value]) -> None:
        """Stores the codes of a row in a group, marks what it reads, and stores its records."""
        isa, g, lane = self.isa, self.g, self.context.lane
        where = self.where
        if g.padded_rows < g.coded_rows:
            exists = row.index < g.padded_rows
            where = exists if where is None else where & exists
        group, channel = self.group(turn), self.channel(turn)
        peak = self.peak(x)
        inverse_unit = isa.reciprocal(peak * (1.0 / PEAK_CODE))
        factors = [inverse_unit * 4.0**-f for f in range(g.planes)]
        rounding, zero = isa.constant(ROUNDING, "f32"), isa.constant(0.0, "f32")
        total = isa.constant(-ROUNDED_ZERO * g.planes * CHANNELS_PER_LANE)
        bits: list[list[Value]] = [[] for _ in range(g.planes)]
        for i, v in enumerate(x):
            # What depends on the peak has no predicate: the compiler would keep them in bits of registers.
            reached = [~(isa.absolute(v) < t) for t in row.thresholds]
            if g.has_padding:
                reached = [reaches & (channel + i < g.in_features) for reaches in reached]
            scaled = times_gain(isa, v, reached, self.gains)
            for f, reaches in enumerate(reached):
                read = isa.select(reaches, scaled, zero)
                rounded = isa.multiply_add(read, factors[f], rounding)
                bits[f].append(isa.float_to_bits(rounded))
                total = total + bits[f][-1]
        high_address, low_distance = self.address(row, group)
        marks = self.context.shared + g.masks_base + group * (g.planes * layout.GROUP) + (lane << 2)
        for f in range(g.planes):
            high, low = packed(isa, bits[f])
            address = high_address + f * g.unit_bytes
            isa.store_shared(address, [high], where)
            isa.store_shared(address + low_distance, [low], where)
            isa.or_shared(marks + f * layout.GROUP, high | low, where)
        self.store_record(row, group, total, peak, where)

    def across_section(self, value: Value, combined: Callable[[Value, Value], Value]) -> Value:
        """Combines a number over the lanes of each section of the group."""
        for i in range(int(math.log2(self.g.section_channels // CHANNELS_PER_LANE))):
            value = combined(value, self.isa.shuffle_xor(value, 1 << i))
        return value

    def peak(self, x: list[Value]) -> Value:
        """Returns the largest ``|x|`` of the lane's section times the largest gain (see ``listing``)."""
        isa, g = self.isa, self.g
        peak, *others = [isa.float_to_bits(isa.absolute(v)) for v in x]
        for other in others:
            peak = isa.maximum(peak, other)
        if g.section_channels == layout.GROUP:
            peak = isa.reduce_max(peak)
        else:
            peak = self.across_section(peak, isa.maximum)
        peak = isa.maximum(peak, isa.constant(SMALLEST_PEAK_BITS))
        return isa.bits_to_float(peak) * largest_gain(isa, self.gains)

    def address(self, row: Row, group: Value) -> tuple[Value, Value | int]:
        """Returns the address of the lane's word of high bytes in plane 0, and the distance to the low bytes.

        The order in a chunk and plane is ``[pair of row tiles][column of B][quarter][row tile][8 channels]``.
        The last pair may have only one row tile.
        With ``warpgroups`` it is that of ``Instructions.queue_warpgroup_multiply_add``.
        """
        isa, g, lane = self.isa, self.g, self.context.lane
        tile = row.index // ROWS_PER_MATRIX
        chunk, word = lane >> 3, lane & 7
        chunk_address = self.context.shared + (group * (layout.GROUP // LANES) + chunk) * g.chunk_bytes
        if g.dense.warpgroups:
            in_chunk = (tile << 8) + ((row.index % ROWS_PER_MATRIX) << 5) + ((word & 1) << 7)
            return chunk_address + in_chunk + ((word >> 1) << 2), 16
        width: Value | int = 16
        if g.row_tiles % 2:
            width = isa.select(tile.equals(g.row_tiles - 1), isa.constant(8), isa.constant(16))
        column = (row.index % ROWS_PER_MATRIX) * 2
        address = (
            chunk_address
            + ((tile >> 1) << 9)
            + ((tile & 1) << 3)
            + (column * 4 + (word >> 1)) * width
            + ((word & 1) << 2)
        )
        return address, width * 4

    def store_record(self, row: Row, group: Value, total: Value, peak: Value, where: Value | None) -> None:
        """Stores what converts the sums of the sections of a group: see ``reduction.midpoint_and_unit``.

        Args:
          row: The row.
          group: The group.
          total: Sum of the lane's codes.
          peak: Peak of the lane's section, without the factor of the norm.
          where: Whether the warp stores; None if all warps do.
        """
        isa, g, lane = self.isa, self.g, self.context.lane
        if g.section_channels == layout.GROUP:
            total = isa.reduce_add(total)
        else:
            total = self.across_section(total, lambda a, b: a + b)
        if row.factor is not None:
            peak = peak * row.factor
        section_lanes = g.section_channels // CHANNELS_PER_LANE
        section = group * g.config.warps_per_group + lane // section_lanes
        address = (section * g.padded_rows + row.index) * RECORD_BYTES + self.context.shared + g.records_base
        first = (lane % section_lanes).equals(0)
        isa.store_shared(
            address, list(midpoint_and_unit(isa, total, peak)), first if where is None else first & where
        )


def clear_marks(isa: Instructions, g: DenseRowsGeometry, context: LaneContext) -> None:
    """Clears the marks of all plane rows."""
    zeros = [isa.constant(0)] * 4
    for first in range(0, g.masks_bytes, 16 * g.threads):
        offset = (context.thread << 4) + first
        isa.store_shared(context.shared + g.masks_base + offset, zeros, offset < g.masks_bytes)


def unpacked(isa: Instructions, g: DenseRowsGeometry, word: Value, half: int) -> Value:
    """Returns one of two 16-bit activations of a word as f32."""
    if g.x_dtype == "bfloat16":
        return isa.bits_to_float(word & 0xFFFF0000 if half else word << 16)
    return isa.half_to_float(word, "high" if half else "low")


def packed(isa: Instructions, bits: list[Value]) -> list[Value]:
    """Packs the high bytes and the low bytes of four codes ``bits ^ LOW_SIGN`` into a word each."""
    first, second = [isa.permute_bytes(a, b, 0x4051) for a, b in (bits[:2], bits[2:])]
    high, low = [isa.permute_bytes(first, second, selector) for selector in (0x5410, 0x7632)]
    return [high, low ^ (LOW_SIGN * 0x01010101)]
