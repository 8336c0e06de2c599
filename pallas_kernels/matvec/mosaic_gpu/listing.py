"""Phases fetch, grade, list and compact: from activations to the list of rows that a warp reads."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES, Geometry
from pallas_kernels.matvec.mosaic_gpu.place import Place, Refs, stored_slice

PEAK_CODE = 127 * 256
"""The integer that the peak becomes: its high byte still fits a signed byte after the low
byte's sign has been carried into it."""

ROUNDING = 1.5 * 2.0**23 + 128
"""Adding it to a float32 below 2**22 leaves the nearest integer, plus 128, in the low mantissa bits.

The 128 carry a low byte of 128 and more into the high byte, as it must be where the low byte is used as
signed; ``LOW_SIGN`` then restores the low byte."""

ROUNDED_ZERO = 0x4B400080
"""The bits of ``ROUNDING``: those of ``ROUNDING + i`` are ``ROUNDED_ZERO + i``."""

LOW_SIGN = 0x80
"""``bits ^ LOW_SIGN`` has the high and the low byte, both signed, of the integer in its low 16 bits."""

PARTS_IN_LANE = 16
"""Parts of a sum over a row of activations that every lane adds up for itself, at most."""

SMALLEST_PEAK_BITS = 0x0DA24260
"""The bits of 1e-30, in place of smaller peaks (all channels zero), so that the grid, peak / PEAK_CODE, is
a number that ``reciprocal`` does not count as zero."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """Registers loaded from global memory. ``q`` counts the channels that this lane grades."""

    thresholds: list[list[Value]]
    """f32 [row][plane]"""
    x: list[list[Value]]
    """f32 [row][q], zero in padding."""
    valid: list[Value] | None
    """[q]: the channel is not padding; None where there is none."""
    factors: list[Value] | None
    """f32 [row]: what the norm still has to multiply x by."""
    gains: list[Value]
    """f32 [level], of levels 1 and up to the one before the last, whose gain is 1."""


@dataclasses.dataclass(frozen=True)
class Reached:
    """Which of the lane's channels reach a plane."""

    rows: list[list[Value]]
    """[row][q]: this activation reads the channel's row of the plane."""
    some: list[Value]
    """[q]: some activation row does, so the row is listed."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """The finished list, and what the end of the program needs to know of it."""

    steps: Value
    """Steps of 8 entries."""
    sums: list[Value]
    """i32 [row]: all integers in the list, summed."""
    peaks: list[Value]
    """f32 [row]: as in ``Scaled``, times the norm's factor: what the row's outputs are multiplied by."""


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Activations as the list has them, but for rounding."""

    x: list[list[Value]]
    """f32 [row][q]: times the gain of its level."""
    peaks: list[Value]
    """f32 [row]: the warp's largest |x| times the largest gain, so no ``x`` above is larger; NaN or Inf if
    an activation is."""


def fetch(isa: Instructions, g: Geometry, refs: Refs, place: Place) -> Operands:
    """Loads everything that grading needs; no load depends on another one."""
    x = isa.global_address(refs.x)
    numbers = range(g.channels_per_lane)
    valid = [place.channel + LANES * q < g.in_features for q in numbers] if g.has_padding else None
    zero = isa.constant(0.0, "f32")
    rows_x, rows_thresholds, factors = [], [], []
    for r in range(g.rows_per_cta):
        row = place.first_row + r
        exists = None
        if g.rows % g.rows_per_cta:  # The last group has rows to spare: they read nothing.
            exists = row < g.rows
            row = isa.select(exists, row, isa.constant(0))
        first = row * g.in_features + place.channel
        rows_x.append([])
        for q in numbers:
            address = x + isa.widen(first * g.x_bytes) + LANES * q * g.x_bytes
            if valid is not None:
                address = isa.select(valid[q], address, x)
            number = load_activation(isa, g, address)
            for ok in (valid and valid[q], exists):
                number = number if ok is None else isa.select(ok, number, zero)
            rows_x[-1].append(number)
        limits, factor = load_thresholds(isa, g, refs, row)
        factors.append(factor)
        if exists is not None:
            limits = [isa.select(exists, t, isa.constant(float("inf"), "f32")) for t in limits]
        rows_thresholds.append(limits)
    return Operands(
        thresholds=rows_thresholds,
        x=rows_x,
        valid=valid,
        factors=factors if g.squares else None,
        gains=load_by_plane(isa, g, isa.global_address(refs.gains))[:-1],
    )


def load_thresholds(
    isa: Instructions, g: Geometry, refs: Refs, row: Value
) -> tuple[list[Value], Value | None]:
    """The thresholds of one activation row in the scale of the activations, and the norm's factor."""
    address = isa.global_address(refs.thresholds) + isa.widen(row * (4 * g.planes))
    thresholds = load_by_plane(isa, g, address)
    if not g.squares:
        return thresholds, None
    square = sum_of_parts(isa, refs.squares, row, g.squares) + g.eps
    factor = isa.rsqrt(square)
    return [t * (square * factor) for t in thresholds], factor


def load_by_plane(isa: Instructions, g: Geometry, address: Value) -> list[Value]:
    """``f32 [planes]``, in one piece if it can be: single loads are moved, the last of them to where the
    first result has long been waited for, which costs a second latency."""
    width = 1 if g.planes == 3 else g.planes
    return [v for f in range(0, g.planes, width) for v in isa.load_global(address + 4 * f, width, "f32")]


def sum_of_parts(isa: Instructions, ref, row: Value, parts: int) -> Value:
    """Sum of one row of ``f32 [rows, parts]``, in a fixed order.

    Few parts are loaded by every lane, four at a time; of many, which would take too many registers, each
    lane loads some, and the warp adds them up.
    """
    first = isa.global_address(ref) + isa.widen(row * (4 * parts))
    if parts <= PARTS_IN_LANE:
        width = 4 if parts % 4 == 0 else 1
        numbers = [v for i in range(0, parts, width) for v in isa.load_global(first + 4 * i, width, "f32")]
        while len(numbers) > 1:
            half = len(numbers) // 2
            pairs = zip(numbers[:half], numbers[half : 2 * half], strict=True)
            numbers = [a + b for a, b in pairs] + numbers[2 * half :]
        return numbers[0]
    lane = isa.thread_index() & (LANES - 1)
    total = isa.constant(0.0, "f32")
    for begin in range(0, parts, LANES):
        inside = lane < parts - begin
        index = isa.select(inside, lane, isa.constant(0)) + begin
        (part,) = isa.load_global(first + isa.widen(index << 2), kind="f32")
        total = total + isa.select(inside, part, isa.constant(0.0, "f32"))
    for distance in (1, 2, 4, 8, 16):
        total = total + isa.shuffle_xor(total, distance)
    return total


def load_activation(isa: Instructions, g: Geometry, address: Value) -> Value:
    """One activation as float32."""
    if g.x_dtype == "float32":
        return isa.load_global(address, kind="f32")[0]
    bits = isa.load_global_16(address)
    return isa.bits_to_float(bits << 16) if g.x_dtype == "bfloat16" else isa.half_to_float(bits, "low")


def grade(isa: Instructions, operands: Operands, plane: int) -> Reached:
    """Levels by comparison, one plane at a time."""
    rows = []
    for x, thresholds in zip(operands.x, operands.thresholds, strict=True):
        # not (|x| < t), so that a NaN is read at every level
        reached = [~(isa.absolute(v) < thresholds[plane]) for v in x]
        if operands.valid is not None:
            reached = [level & ok for level, ok in zip(reached, operands.valid, strict=True)]
        rows.append(reached)
    some = rows[0]
    for row in rows[1:]:
        some = [a | b for a, b in zip(some, row, strict=True)]
    return Reached(rows, some)


@dataclasses.dataclass
class RowList:
    """The list as far as it is written: plane by plane, in a plane channel by channel."""

    isa: Instructions
    g: Geometry
    place: Place
    end: Value
    """Shared-memory address behind the last entry, the same in the whole warp."""

    def append(self, listed: Value, plane: int, q: int) -> tuple[Value, Value]:
        """Takes in rows where ``listed`` holds: the address of the lane's entry, and its row's offset."""
        isa, g = self.isa, self.g
        lanes = isa.ballot(listed)
        entry = self.end + isa.count_bits(lanes & isa.lower_lanes()) * g.entry_bytes
        self.end = self.end + isa.count_bits(lanes) * g.entry_bytes
        channel = self.place.channel * g.stored_row_bytes + self.place.tile * ROW_BYTES
        return entry, channel + (plane * g.plane_bytes + q * LANES * g.stored_row_bytes)

    def whole_steps(self) -> Value:
        """Steps that have all their entries."""
        return (self.end - self.place.list) // self.g.step_entries_bytes


def list_first_plane(isa: Instructions, g: Geometry, rows: RowList, first: Reached) -> list[Value]:
    """Lists plane 0 without codes: to copy its rows nothing else need be known. The entries' addresses."""
    addresses = []
    for q, listed in enumerate(first.some):
        address, offset = rows.append(listed, 0, q)
        isa.store_shared(address, [offset], listed)
        addresses.append(address)
    isa.warp_barrier()
    return addresses


def scale(isa: Instructions, operands: Operands, reached: list[Reached]) -> Scaled:
    """Gains by selection, peaks by a maximum over the warp.

    The maximum is taken before the gains, so that neither of the two waits for the other.
    """
    scaled, peaks = [], []
    largest_gain = isa.float_to_bits(isa.constant(1.0, "f32"))
    for gain in operands.gains:
        largest_gain = isa.maximum(largest_gain, isa.float_to_bits(gain))
    largest_gain = isa.bits_to_float(largest_gain)
    for r, x in enumerate(operands.x):
        levels = [[plane.rows[r][q] for plane in reached] for q in range(len(x))]
        scaled.append([at_level(isa, v, level, operands.gains) for v, level in zip(x, levels, strict=True)])
        bits = [isa.float_to_bits(isa.absolute(v)) for v in x]
        peak = bits[0]
        for other in bits[1:]:
            peak = isa.maximum(peak, other)
        peak = isa.maximum(isa.reduce_max(peak), isa.constant(SMALLEST_PEAK_BITS))
        peaks.append(isa.bits_to_float(peak) * largest_gain)
    return Scaled(scaled, peaks)


def at_level(isa: Instructions, x: Value, reached: list[Value], gains: list[Value]) -> Value:
    """``x`` times the gain of its level; the highest level's is 1."""
    factor = isa.constant(1.0, "f32")
    for gain, passed in zip(reversed(gains), reversed(reached[1:]), strict=True):
        factor = isa.select(passed, factor, gain)
    return x * factor


def compact(
    isa: Instructions, g: Geometry, operands: Operands, first: Reached, addresses: list[Value], rows: RowList
) -> Listed:
    """Completes the list: codes of the first plane, the other planes, zeros up to a whole step."""
    reached = [first] + [grade(isa, operands, f) for f in range(1, g.planes)]
    scaled = scale(isa, operands, reached)
    grids = [isa.reciprocal(peak * (1.0 / PEAK_CODE)) for peak in scaled.peaks]
    rounding, rounded_zero = isa.constant(ROUNDING, "f32"), isa.constant(ROUNDED_ZERO)
    sums = [isa.constant(-ROUNDED_ZERO * g.planes * g.channels_per_lane)] * g.rows_per_cta
    for f, plane in enumerate(reached):
        steps_of_plane = [grid * 4.0**-f for grid in grids]
        for q, listed in enumerate(plane.some):
            codes = []
            for r in range(g.rows_per_cta):
                rounded = isa.multiply_add(scaled.x[r][q], steps_of_plane[r], rounding)
                bits = isa.select(plane.rows[r][q], isa.float_to_bits(rounded), rounded_zero)
                sums[r] = sums[r] + bits
                codes.append(bits ^ LOW_SIGN)
            if f == 0:
                store_codes(isa, g, addresses[q], codes, listed)
            else:
                address, offset = rows.append(listed, f, q)
                store_entry(isa, g, address, offset, codes, listed)
    place, step_bytes = rows.place, g.step_entries_bytes
    size = (rows.end - place.list + (step_bytes - 1)) & -step_bytes
    zeros = [isa.constant(0)] * g.rows_per_cta
    address = rows.end + place.lane * g.entry_bytes
    store_entry(isa, g, address, padding_offset(isa, g, place), zeros, where=address < place.list + size)
    isa.warp_barrier()
    peaks = scaled.peaks
    if operands.factors is not None:
        peaks = [peak * factor for peak, factor in zip(peaks, operands.factors, strict=True)]
    return Listed(steps=size // step_bytes, sums=[isa.reduce_add(s) for s in sums], peaks=peaks)


def park(isa: Instructions, g: Geometry, place: Place, listed: Listed) -> None:
    """Leaves sums and peaks in the warp's record: the loop needs the registers."""
    for r in range(g.rows_per_cta):
        with isa.when(place.lane.equals(r)):
            isa.store_shared(place.record + 8 * r, [listed.sums[r], isa.float_to_bits(listed.peaks[r])])


def padding_offset(isa: Instructions, g: Geometry, place: Place) -> Value:
    """A row that padding entries may read (times zero): the slice's first, in plane 0."""
    first = stored_slice(isa, g, place) * layout.GROUP
    return first * g.stored_row_bytes + place.tile * ROW_BYTES


def store_entry(
    isa: Instructions, g: Geometry, address: Value, offset: Value, codes: list[Value], where: Value
) -> None:
    """One list entry: ``offset`` of the row in the planes, 16-bit codes of two activation rows a word."""
    isa.store_shared(address, [offset, *packed_codes(isa, g, codes)], where)


def store_codes(isa: Instructions, g: Geometry, address: Value, codes: list[Value], where: Value) -> None:
    """The codes of an entry that has its offset."""
    first, *others = packed_codes(isa, g, codes)
    isa.store_shared(address + 4, [first], where)
    if others:
        isa.store_shared(address + 8, others, where)


def packed_codes(isa: Instructions, g: Geometry, codes: list[Value]) -> list[Value]:
    """The words of an entry behind its offset."""
    words = []
    for r in range(0, len(codes), 2):
        pair = codes[r : r + 2]
        words.append(pair[0] if len(pair) == 1 else isa.permute_bytes(pair[0], pair[1], 0x5410))
    return words + [words[-1]] * (g.entry_words - 1 - len(words))
