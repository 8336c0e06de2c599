"""Phases fetch, grade, list and compact: from activations to the list of plane rows that a warp reads.

``program`` describes the phases. In this file ``r`` is an activation row, ``f`` a plane, and ``q`` one of the
channels that the lane grades.
"""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.lanes.rows import sum_partials
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES, Geometry
from pallas_kernels.matvec.mosaic_gpu.lane_context import LaneContext, Refs, stored_group

PEAK_CODE = 127 * 256
"""Code of the peak. Its high byte fits a signed byte, even with a carry from the low byte."""

ROUNDING = 1.5 * 2.0**23 + 128
"""Adding this to a float32 below 2**22 leaves the nearest integer, plus 128, in the low bits of the mantissa.

The matrix unit reads the low byte of a code as signed, so a low byte of 128 or more must carry into the high
byte. The 128 causes the carry, and ``LOW_SIGN`` restores the low byte."""

ROUNDED_ZERO = 0x4B400080
"""Bits of ``ROUNDING``. The bits of ``ROUNDING + i`` are ``ROUNDED_ZERO + i``."""

LOW_SIGN = 0x80
"""``bits ^ LOW_SIGN`` holds, in its low 16 bits, the high and the low byte of the integer, both signed."""

SMALLEST_PEAK_BITS = 0x0DA24260
"""Bits of 1e-30, which replaces smaller peaks, such as 0 if all channels are zero. With a smaller peak,
``reciprocal`` would flush the unit of the codes, ``peak / PEAK_CODE``, to zero."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """Registers loaded from global memory.

    Attributes:
      thresholds: f32 ``[row][plane]``, divided by the factor of the norm, because x lacks it.
      x: f32 ``[row][q]``, before the factor of the norm; zero in padding.
      valid: bool ``[q]``, whether the channel exists; None without padding.
      factors: f32 ``[row]``, factor of the norm; None without a norm.
      gains: f32 ``[level]``, level gains of levels 1 to P - 1. The gain of level P is 1.
    """

    thresholds: list[list[Value]]
    x: list[list[Value]]
    valid: list[Value] | None
    factors: list[Value] | None
    gains: list[Value]


@dataclasses.dataclass(frozen=True)
class Reached:
    """Which of the lane's channels reach a plane.

    Attributes:
      rows: bool ``[row][q]``, whether this activation row reads the channel's row of the plane.
      any_row: bool ``[q]``, whether some activation row reads it, so that the plane row is listed.
    """

    rows: list[list[Value]]
    any_row: list[Value]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Activations times the gains of their levels, before they are rounded to codes.

    Attributes:
      x: f32 ``[row][q]``, the scaled activations.
      peaks: f32 ``[row]``, the largest ``|x|`` of the warp times the largest gain: an upper bound of the
        scaled ``|x|``. NaN or Inf if an activation is.
    """

    x: list[list[Value]]
    peaks: list[Value]


@dataclasses.dataclass(frozen=True)
class FinishedList:
    """The warp's finished list.

    Attributes:
      steps: Number of steps of the program, of 8 entries each (``byte_pairs``: 16).
      sums: i32 ``[row]``, sums of all codes in the list.
      peaks: f32 ``[row]``, peaks of ``Scaled`` times the factor of the norm. They multiply the row's outputs.
    """

    steps: Value
    sums: list[Value]
    peaks: list[Value]


def fetch(isa: Instructions, g: Geometry, refs: Refs, context: LaneContext) -> Operands:
    """Loads everything that grading needs. No load depends on another."""
    x = isa.global_address(refs.x)
    channels = range(g.channels_per_lane)
    valid = [context.channel + LANES * q < g.in_features for q in channels] if g.has_padding else None
    zero = isa.constant(0.0, "f32")
    rows_x: list[list[Value]] = []
    rows_thresholds: list[list[Value]] = []
    factors: list[Value] = []
    for r in range(g.rows_per_cta):
        row = context.first_row + r
        exists = None
        if g.rows % g.rows_per_cta:  # The last batch may have rows that do not exist. They read nothing.
            exists = row < g.rows
            row = isa.select(exists, row, isa.constant(0))
        first = g.x_row(row) * g.in_features + context.channel
        rows_x.append([])
        for q in channels:
            address = x + isa.widen(first * g.x_bytes) + LANES * q * g.x_bytes
            if valid is not None:
                address = isa.select(valid[q], address, x)
            number = load_activation(isa, g, address)
            for condition in (None if valid is None else valid[q], exists):
                number = number if condition is None else isa.select(condition, number, zero)
            rows_x[-1].append(number)
        thresholds, factor = load_thresholds(isa, g, refs, row)
        if factor is not None:
            factors.append(factor)
        if exists is not None:
            thresholds = [isa.select(exists, t, isa.constant(float("inf"), "f32")) for t in thresholds]
        rows_thresholds.append(thresholds)
    return Operands(
        thresholds=rows_thresholds,
        x=rows_x,
        valid=valid,
        factors=factors if g.num_square_partials else None,
        gains=load_by_plane(isa, g, isa.global_address(refs.level_gains))[:-1],
    )


def load_thresholds(
    isa: Instructions, g: Geometry, refs: Refs, row: Value
) -> tuple[list[Value], Value | None]:
    """Loads the thresholds of one row, divided by the factor of its norm (which x lacks), and this factor."""
    address = isa.global_address(refs.thresholds) + isa.widen(g.threshold_row(row) * (4 * g.planes))
    thresholds = load_by_plane(isa, g, address)
    if not g.num_square_partials:
        return thresholds, None
    square = sum_partials(isa, refs.square_partials, row, g.num_square_partials) + g.eps
    factor = isa.rsqrt(square)
    return [t * (square * factor) for t in thresholds], factor


def load_by_plane(isa: Instructions, g: Geometry, address: Value) -> list[Value]:
    """Loads ``f32 [planes]``, in one vector if possible.

    If there were several loads, the compiler would move the last one behind the use of the first one, and the
    lane would wait for memory twice.
    """
    width = 1 if g.planes == 3 else g.planes
    return [v for f in range(0, g.planes, width) for v in isa.load_global(address + 4 * f, width, "f32")]


def load_activation(isa: Instructions, g: Geometry, address: Value) -> Value:
    """Loads one activation as float32."""
    if g.x_dtype == "float32":
        return isa.load_global(address, kind="f32")[0]
    bits = isa.load_global_16(address)
    return isa.bits_to_float(bits << 16) if g.x_dtype == "bfloat16" else isa.half_to_float(bits, "low")


def grade(isa: Instructions, operands: Operands, plane: int) -> Reached:
    """Returns which channels reach a plane."""
    rows = []
    for x, thresholds in zip(operands.x, operands.thresholds, strict=True):
        # Not |x| >= t, because a NaN must reach every level.
        reached = [~(isa.absolute(v) < thresholds[plane]) for v in x]
        if operands.valid is not None:
            reached = [reaches & valid for reaches, valid in zip(reached, operands.valid, strict=True)]
        rows.append(reached)
    any_row = rows[0]
    for row in rows[1:]:
        any_row = [a | b for a, b in zip(any_row, row, strict=True)]
    return Reached(rows, any_row)


@dataclasses.dataclass
class RowList:
    """The warp's list while it is written: plane by plane, and channel by channel in each plane."""

    isa: Instructions
    g: Geometry
    context: LaneContext
    end: Value
    """Shared-memory address after the last entry; all lanes of the warp have the same."""

    def reserve(self, listed: Value, plane: int, q: int) -> tuple[Value, Value]:
        """Reserves an entry for each lane whose ``listed`` holds, in the order of the lanes.

        Returns:
          The address of the lane's entry, and the offset of its plane row.
        """
        isa, g = self.isa, self.g
        lanes = isa.ballot(listed)
        entry = self.end + isa.count_bits(lanes & isa.lower_lanes()) * g.entry_bytes
        self.end = self.end + isa.count_bits(lanes) * g.entry_bytes
        plane_row = self.context.channel * g.stored_row_bytes + self.context.tile * ROW_BYTES
        return entry, plane_row + (plane * g.plane_bytes + q * LANES * g.stored_row_bytes)

    def whole_steps(self) -> Value:
        """Returns the number of complete steps in the list so far."""
        return (self.end - self.context.list) // self.g.step_entries_bytes


def list_first_plane(isa: Instructions, g: Geometry, rows: RowList, first: Reached) -> list[Value]:
    """Lists the rows of plane 0 without codes, so that copies can start; returns the entries' addresses."""
    addresses = []
    for q, listed in enumerate(first.any_row):
        address, offset = rows.reserve(listed, 0, q)
        isa.store_shared(address, [offset], listed)
        addresses.append(address)
    isa.warp_barrier()
    return addresses


def scale(isa: Instructions, operands: Operands, reached: list[Reached]) -> Scaled:
    """Multiplies activations by the gains of their levels, and finds the peaks of the warp.

    The peaks come from unscaled activations and the largest gain, so neither computation waits for the other.
    """
    scaled, peaks = [], []
    largest = largest_gain(isa, operands.gains)
    for r, x in enumerate(operands.x):
        reached_by_q = [[plane.rows[r][q] for plane in reached] for q in range(len(x))]
        scaled.append([times_gain(isa, v, p, operands.gains) for v, p in zip(x, reached_by_q, strict=True)])
        peaks.append(largest_activation(isa, x) * largest)
    return Scaled(scaled, peaks)


def largest_gain(isa: Instructions, gains: list[Value]) -> Value:
    """Returns the largest gain of all levels."""
    largest = isa.float_to_bits(isa.constant(1.0, "f32"))
    for gain in gains:
        largest = isa.maximum(largest, isa.float_to_bits(gain))
    return isa.bits_to_float(largest)


def largest_activation(isa: Instructions, x: list[Value]) -> Value:
    """Returns the largest ``|x|`` of the warp, at least 1e-30; NaN or Inf if an activation is."""
    bits = [isa.float_to_bits(isa.absolute(v)) for v in x]
    peak = bits[0]
    for other in bits[1:]:
        peak = isa.maximum(peak, other)
    peak = isa.maximum(isa.reduce_max(peak), isa.constant(SMALLEST_PEAK_BITS))
    return isa.bits_to_float(peak)


def times_gain(isa: Instructions, x: Value, reached: list[Value], gains: list[Value]) -> Value:
    """Returns ``x`` times the gain of its level. The gain of the highest level is 1."""
    factor = isa.constant(1.0, "f32")
    for gain, reaches_next in zip(reversed(gains), reversed(reached[1:]), strict=True):
        factor = isa.select(reaches_next, factor, gain)
    return x * factor


def compact(
    isa: Instructions, g: Geometry, operands: Operands, first: Reached, addresses: list[Value], rows: RowList
) -> FinishedList:
    """Completes the list: codes of the first plane, the other planes, and padding to a whole step.

    Args:
      isa, g: The instructions and sizes.
      operands: Thresholds and activations.
      first: Channels that reach plane 0.
      addresses: Addresses of the entries of plane 0, ``[q]``.
      rows: The list, which has the entries of plane 0 without their codes.
    """
    reached = [first] + [grade(isa, operands, f) for f in range(1, g.planes)]
    scaled = scale(isa, operands, reached)
    inverse_units = [isa.reciprocal(peak * (1.0 / PEAK_CODE)) for peak in scaled.peaks]
    rounding, rounded_zero = isa.constant(ROUNDING, "f32"), isa.constant(ROUNDED_ZERO)
    sums = [isa.constant(-ROUNDED_ZERO * g.planes * g.channels_per_lane)] * g.rows_per_cta
    for f, plane in enumerate(reached):
        factors = [inverse * 4.0**-f for inverse in inverse_units]
        for q, listed in enumerate(plane.any_row):
            codes = []
            for r in range(g.rows_per_cta):
                rounded = isa.multiply_add(scaled.x[r][q], factors[r], rounding)
                bits = isa.select(plane.rows[r][q], isa.float_to_bits(rounded), rounded_zero)
                sums[r] = sums[r] + bits
                codes.append(bits ^ LOW_SIGN)
            if f == 0:
                store_codes(isa, g, addresses[q], codes, listed)
            else:
                address, offset = rows.reserve(listed, f, q)
                store_entry(isa, g, address, offset, codes, listed)
    context, step_bytes = rows.context, g.step_entries_bytes
    size = (rows.end - context.list + (step_bytes - 1)) & -step_bytes
    zeros = [isa.constant(0)] * g.rows_per_cta
    address = rows.end + context.lane * g.entry_bytes
    store_entry(isa, g, address, padding_offset(isa, g, context), zeros, where=address < context.list + size)
    isa.warp_barrier()
    peaks = scaled.peaks
    if operands.factors is not None:
        peaks = [peak * factor for peak, factor in zip(peaks, operands.factors, strict=True)]
    return FinishedList(steps=size // step_bytes, sums=[isa.reduce_add(s) for s in sums], peaks=peaks)


def store_record(isa: Instructions, g: Geometry, context: LaneContext, listed: FinishedList) -> None:
    """Stores sums and peaks in the warp's record in shared memory, because the loop needs their registers."""
    for r in range(g.rows_per_cta):
        with isa.when(context.lane.equals(r)):
            isa.store_shared(context.record + 8 * r, [listed.sums[r], isa.float_to_bits(listed.peaks[r])])


def padding_offset(isa: Instructions, g: Geometry, context: LaneContext) -> Value:
    """Returns the offset of the plane row that padding entries read: the first of the group."""
    first = stored_group(isa, g, context) * layout.GROUP
    return first * g.stored_row_bytes + context.tile * ROW_BYTES


def store_entry(
    isa: Instructions, g: Geometry, address: Value, offset: Value, codes: list[Value], where: Value
) -> None:
    """Stores a list entry: the offset of its plane row, and 16-bit codes."""
    if g.code_stride == 4:
        isa.store_shared(address, [offset, *packed_codes(isa, codes)], where)
    else:
        isa.store_shared(address, [offset], where)
        store_codes(isa, g, address, codes, where)


def store_codes(isa: Instructions, g: Geometry, address: Value, codes: list[Value], where: Value) -> None:
    """Stores the codes of an entry whose offset is already stored."""
    first, *others = packed_codes(isa, codes)
    isa.store_shared(address + g.code_stride, [first], where)
    if others:
        isa.store_shared(address + 2 * g.code_stride, others, where)


def packed_codes(isa: Instructions, codes: list[Value]) -> list[Value]:
    """Packs the codes of two activation rows into each word of an entry."""
    words = []
    for r in range(0, len(codes), 2):
        pair = codes[r : r + 2]
        words.append(pair[0] if len(pair) == 1 else isa.permute_bytes(pair[0], pair[1], 0x5410))
    return words
