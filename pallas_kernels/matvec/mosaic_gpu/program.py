"""The lane program of the graded matvec: what each lane does, phase by phase.

    y[n] = sum_s scales[s, n] * sum_{k in slice s} x[k] * sum_{f < level_k} (d_f[k, n] - 3/2) 4**-f

which is ``weight.NestedWeight``'s definition, since ``0.5 * 4**(1 - l) - 2 = -3/2 sum_{f < l} 4**-f``.

Storage, and who reads what
===========================

    planes[f]           tile 0          tile 1       ...      one plane; a row = one input channel
                   +---------------+---------------+
    channel 0      | 128 bytes     |               |          a row in a tile: 512 digits of 2 bits,
    channel 1      |   skipped     |               |          32 words; read in one piece, or not at all
       ...         |               |               |
    channel 127    +---------------+---------------+  slice 0 : one scale per output, one list of rows
    channel 128    |               |               |
       ...         +---------------+---------------+  slice 1

    CTA        one tile x `slices_per_cta` slices, up to 4 activation rows
    warp       its own channels, 128 / `warps_per_slice` of a slice; on its own until the last phase
    step       8 rows = 1 KiB, one slot of the warp's ring

Phases
======
fetch    thresholds and activations from global memory into registers; scales on their way to shared memory
grade    level of each channel and activation row; the largest |x| of the warp's channels, its *peak*
compact  the rows to read, of all planes, as one list in shared memory: (offset of the row, x 4**-f)
stream   copy listed rows into the ring, `ring_slots - 1` steps ahead ...
multiply ... and multiply each step on the matrix unit, exactly, in int32
combine  integers to float32: bytes joined, midpoints subtracted
reduce   scales applied, sum over the CTA's warps in a fixed order, one partial sum per CTA to global memory

The last CTAs, one per activation row, only count the row's levels (`count_levels`): they are done long before
the others, and no other kernel has to add up counts.

The multiply (see ``layout`` for the order of outputs in a tile)
================================================================

    word          31  ..  24 23  ..  16 15  ..   8  7 6 5 4 3 2 1 0      16 digits, 4 to a byte
    & 03030303h                                             d d         digit position p = 0
    & 0c0c0c0ch                                         d d             p = 1: the byte is 4 d
                                                                        p = 2, 3: 16 d, 64 d

Masked words go to the matrix unit as they are, as bytes of A [16 words, 32 = 8 list rows x 4 bytes]: no
shifts, no transposes. The factor 4**p is taken out at the end. B [32, 8] holds x, rounded to 16 bits on
the grid ``peak / 32512``, split into a high and a low byte: columns 2 b and 2 b + 1 have the high and the
low byte of x where k's byte position is b, and zeros elsewhere. So one instruction multiplies 8 rows x 64
outputs, 2 word groups x 4 digit positions make a tile, and a lane ends up with both bytes' sums of its
outputs. All planes go into the same accumulators, because the list holds x * 4**-f.

The midpoints need no extra pass: the sum of everything the list holds, times 3/2, is subtracted.

A NaN or Inf in x is read at every level, becomes the peak of its warp, and so the factor that every output
of the warp is multiplied by.
"""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.matvec.mosaic_gpu.geometry import (
    LANES,
    ROW_BYTES,
    SCALES_BYTES,
    STEP_BYTES,
    STEP_ROWS,
    Geometry,
)
from pallas_kernels.matvec.mosaic_gpu.instructions import Instructions, Value

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

SMALLEST_PEAK_BITS = 0x0DA24260
"""The bits of 1e-30, in place of smaller peaks (all channels zero), so that 1 / peak is finite."""

POSITION_MASKS = tuple(0x03030303 << (2 * p) for p in range(4))
"""The digits at position ``p`` of the four bytes of a word."""

MEAN_DIGIT = 1.5
"""What the midpoint of a level subtracts from every digit read."""

COUNT_UNROLL = 16
"""Activations that a lane loads at once when it counts levels."""

COPY_BYTES = 16
COPY_LANES = ROW_BYTES // COPY_BYTES
"""Consecutive lanes that copy one row: whole 128-byte lines reach full bandwidth, pieces do not."""


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the CTA's shared memory.

    ``x [rows, in_features]``, ``thresholds f32 [rows, P]``, ``planes`` and ``scales`` of the weight;
    written: ``partials f32 [slice_groups, rows, N]`` and ``bits f32 [rows]``, the
    mean bits read.
    """

    x: Any
    thresholds: Any
    planes: Any
    scales: Any
    partials: Any
    bits: Any
    shared: Any


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the lane is, and the shared-memory addresses it works on."""

    thread: Value
    lane: Value
    slice_index: Value
    """Of the whole weight; may lie past the last one, where all channels count as padding."""
    channel: Value
    """Input channel that is the lane's ``q = 0``; its next ones follow at distances of 32."""
    slice_group: Value
    tile: Value
    first_row: Value
    """First activation row of the CTA."""
    shared: Value
    list: Value
    """The warp's list."""
    record: Value
    """The warp's record."""
    scales: Value
    """The warp's scales."""
    ring: Value
    """The warp's ring."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """Registers loaded from global memory. ``q`` counts the channels that this lane grades."""

    thresholds: list[list[Value]]
    """f32 [row][plane]"""
    x: list[list[Value]]
    """f32 [row][q], zero in padding."""
    valid: list[Value]
    """[q]: the channel is not padding."""


@dataclasses.dataclass(frozen=True)
class Grades:
    """What grading found."""

    reached: list[list[list[Value]]]
    """[row][q][plane]: this activation reads the channel's row of the plane."""
    any_reached: list[list[Value]]
    """[q][plane]: some activation row does, so the row is listed."""
    peaks: list[Value]
    """f32 [row]: largest |x| of the warp's channels; NaN or Inf if one is."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """The finished list, and what the end of the program needs to know of it."""

    steps: Value
    """Steps of 8 entries."""
    sums: list[Value]
    """i32 [row]: all integers in the list, summed."""
    peaks: list[Value]
    """f32 [row]: as in ``Grades``."""


def graded_matvec_program(isa: Instructions, geometry: Geometry, refs: Refs) -> None:
    """One lane's whole work."""
    multiplies = isa.block_index() < geometry.matvec_blocks
    with isa.when(multiplies):
        matvec(isa, geometry, refs)
    with isa.when(~multiplies):
        count_levels(isa, geometry, refs)


def matvec(isa: Instructions, geometry: Geometry, refs: Refs) -> None:
    """What a lane of the CTAs that multiply does."""
    place = locate(isa, geometry, refs)
    operands = fetch(isa, geometry, refs, place)
    copy_scales(isa, geometry, refs, place)
    grades = grade(isa, operands)
    listed = compact(isa, geometry, place, operands, grades)
    park(isa, geometry, place, listed)
    accumulators = stream(isa, geometry, refs, place, listed.steps)
    for row in range(geometry.rows_per_cta):
        outputs = combine(isa, geometry, place, accumulators, row)
        reduce(isa, geometry, refs, place, outputs, row)


def locate(isa: Instructions, g: Geometry, refs: Refs) -> Place:
    """Cuts the grid: row group fastest, then tile, then slice group."""
    config = g.config
    block, thread = isa.block_index(), isa.thread_index()
    row_group, block = (block % g.row_groups, block // g.row_groups) if g.row_groups > 1 else (None, block)
    tile, slice_group = block % g.tiles, block // g.tiles
    lane, warp = thread & (LANES - 1), thread >> 5
    slice_of_group, part = warp // config.warps_per_slice, warp % config.warps_per_slice
    slice_index = slice_group * config.slices_per_cta + slice_of_group
    shared = isa.shared_address(refs.shared)
    return Place(
        thread=thread,
        lane=lane,
        slice_index=slice_index,
        channel=slice_index * layout.SLICE + part * (LANES * g.channels_per_lane) + lane,
        slice_group=slice_group,
        tile=tile,
        first_row=isa.constant(0) if row_group is None else row_group * g.rows_per_cta,
        shared=shared,
        list=shared + warp * g.list_bytes,
        record=shared + g.record_base + warp * g.record_bytes,
        scales=shared + g.scales_base + warp * SCALES_BYTES,
        ring=shared + g.ring_base + warp * g.ring_bytes,
    )


def fetch(isa: Instructions, g: Geometry, refs: Refs, place: Place) -> Operands:
    """Loads everything that grading needs; no load depends on another one."""
    x = isa.global_address(refs.x)
    channels = [place.channel + LANES * q for q in range(g.channels_per_lane)]
    valid = [channel < g.in_features for channel in channels]
    zero = isa.constant(0.0, "f32")
    rows_x, rows_thresholds = [], []
    for r in range(g.rows_per_cta):
        row = place.first_row + r
        exists = None
        if g.rows % g.rows_per_cta:  # The last group has rows to spare: they read nothing.
            exists = row < g.rows
            row = isa.select(exists, row, isa.constant(0))
        rows_x.append([])
        for channel, ok in zip(channels, valid, strict=True):
            ok = ok if exists is None else ok & exists
            element = isa.select(ok, row * g.in_features + channel, isa.constant(0))
            number = load_activation(isa, g, x + isa.widen(element * g.x_bytes))
            rows_x[-1].append(isa.select(ok, number, zero))
        limits = load_thresholds(isa, g, refs, row)
        if exists is not None:
            limits = [isa.select(exists, t, isa.constant(float("inf"), "f32")) for t in limits]
        rows_thresholds.append(limits)
    return Operands(thresholds=rows_thresholds, x=rows_x, valid=valid)


def copy_scales(isa: Instructions, g: Geometry, refs: Refs, place: Place) -> None:
    """Starts copying the warp's 512 scales to shared memory; done when the stream has been waited for.

    In registers they would cost the loop 8 of them, and with those the sixth CTA on a multiprocessor.
    """
    stored_slice = isa.select(place.slice_index < g.slices, place.slice_index, isa.constant(0))
    first = (stored_slice * g.stored_n + place.tile * layout.TILE) << 1
    source = isa.global_address(refs.scales) + isa.widen(first + (place.lane << 4))
    for part in range(SCALES_BYTES // (LANES * COPY_BYTES)):
        offset = part * LANES * COPY_BYTES
        isa.copy_async(place.scales + offset + (place.lane << 4), source + offset)


def load_thresholds(isa: Instructions, g: Geometry, refs: Refs, row: Value) -> list[Value]:
    """The thresholds of one activation row."""
    address = isa.global_address(refs.thresholds) + isa.widen(row * (4 * g.planes))
    return [isa.load_global(address + 4 * f, kind="f32")[0] for f in range(g.planes)]


def load_activation(isa: Instructions, g: Geometry, address: Value) -> Value:
    """One activation as float32."""
    if g.x_dtype == "float32":
        return isa.load_global(address, kind="f32")[0]
    bits = isa.load_global_16(address)
    return isa.bits_to_float(bits << 16) if g.x_dtype == "bfloat16" else isa.half_to_float(bits, "low")


def grade(isa: Instructions, operands: Operands) -> Grades:
    """Levels by comparison, peaks by a maximum over the warp."""
    reached, peaks = [], []
    for x, thresholds in zip(operands.x, operands.thresholds, strict=True):
        magnitudes = [isa.absolute(v) for v in x]
        # not (|x| < t), so that a NaN is read at every level
        reached.append(
            [[~(m < t) & ok for t in thresholds] for m, ok in zip(magnitudes, operands.valid, strict=True)]
        )
        bits = [isa.float_to_bits(m) for m in magnitudes]
        peak = bits[0]
        for other in bits[1:]:
            peak = isa.maximum(peak, other)
        peak = isa.maximum(isa.reduce_max(peak), isa.constant(SMALLEST_PEAK_BITS))
        peaks.append(isa.bits_to_float(peak))
    any_reached = reached[0]
    for row in reached[1:]:
        any_reached = [
            [a | b for a, b in zip(one, two, strict=True)] for one, two in zip(any_reached, row, strict=True)
        ]
    return Grades(reached=reached, any_reached=any_reached, peaks=peaks)


def compact(isa: Instructions, g: Geometry, place: Place, operands: Operands, grades: Grades) -> Listed:
    """Writes the list: plane by plane, in a plane channel by channel, padded with zeros to a whole step."""
    grids = [isa.divide(isa.constant(float(PEAK_CODE), "f32"), peak) for peak in grades.peaks]
    rounding = isa.constant(ROUNDING, "f32")
    row_offset = place.channel * g.stored_row_bytes + place.tile * ROW_BYTES
    lower_lanes, count, zero = isa.lower_lanes(), isa.constant(0), isa.constant(0)
    rounded_zero = isa.constant(ROUNDED_ZERO)
    sums = [isa.constant(-ROUNDED_ZERO * g.planes * g.channels_per_lane)] * g.rows_per_cta
    for f in range(g.planes):
        steps_of_plane = [grid * 4.0**-f for grid in grids]
        for q, channel in enumerate(grades.any_reached):
            listed = isa.ballot(channel[f])
            entry = count + isa.count_bits(listed & lower_lanes)
            codes = []
            for r in range(g.rows_per_cta):
                rounded = isa.multiply_add(operands.x[r][q], steps_of_plane[r], rounding)
                bits = isa.float_to_bits(rounded)
                bits = isa.select(grades.reached[r][q][f], bits, rounded_zero)
                sums[r] = sums[r] + bits
                codes.append(bits ^ LOW_SIGN)
            offset = row_offset + (f * g.plane_bytes + q * LANES * g.stored_row_bytes)
            store_entry(isa, g, place.list + entry * g.entry_bytes, offset, codes, where=channel[f])
            count = count + isa.count_bits(listed)
    steps = (count + (STEP_ROWS - 1)) >> 3
    pad = count + place.lane
    padding = [zero] * g.rows_per_cta
    address = place.list + pad * g.entry_bytes
    store_entry(isa, g, address, padding_offset(isa, g, place), padding, where=pad < (steps << 3))
    isa.warp_barrier()
    return Listed(steps=steps, sums=[isa.reduce_add(s) for s in sums], peaks=grades.peaks)


def park(isa: Instructions, g: Geometry, place: Place, listed: Listed) -> None:
    """Leaves sums and peaks in the warp's record: the loop needs the registers."""
    for r in range(g.rows_per_cta):
        with isa.when(place.lane.equals(r)):
            isa.store_shared(place.record + 8 * r, [listed.sums[r], isa.float_to_bits(listed.peaks[r])])


def padding_offset(isa: Instructions, g: Geometry, place: Place) -> Value:
    """A row that padding entries may read (times zero): the slice's first, in plane 0."""
    first = isa.select(place.slice_index < g.slices, place.slice_index, isa.constant(0)) * layout.SLICE
    return first * g.stored_row_bytes + place.tile * ROW_BYTES


def store_entry(
    isa: Instructions, g: Geometry, address: Value, offset: Value, codes: list[Value], where: Value
) -> None:
    """One list entry: ``offset`` of the row in the planes, 16-bit codes of two activation rows a word."""
    words = [offset]
    for r in range(0, len(codes), 2):
        pair = codes[r : r + 2]
        words.append(pair[0] if len(pair) == 1 else isa.permute_bytes(pair[0], pair[1], 0x5410))
    words += [words[-1]] * (g.entry_words - len(words))
    isa.store_shared(address, words, where)


def stream(isa: Instructions, g: Geometry, refs: Refs, place: Place, steps: Value) -> list[Value]:
    """Copies and multiplies the warp's ``steps``; int32 accumulators ``[row][half][position][4]``, flat."""
    slots = g.config.ring_slots
    planes = isa.global_address(refs.planes)
    stride = STEP_ROWS * g.entry_bytes
    # Copying: 8 lanes to a row, rows 2 i and 2 i + 1 of the list by lanes 8 i .. 8 i + 7. Slots are
    # swizzled, so that neither the copies nor the loads below meet in a bank.
    copy_row, copy_piece = place.lane >> 3, place.lane & (COPY_LANES - 1)
    copy_to = place.ring + (copy_row << 7) + ((copy_piece ^ (copy_row << 1)) << 4)
    copy_from = planes + isa.widen(copy_piece << 4)
    copy_entries = place.list + copy_row * (2 * g.entry_bytes)
    # Multiplying: lane 4 row + column takes words of group `row` of the list rows 2 column, + 1.
    row, column = place.lane >> 2, place.lane & 3
    take_from = place.ring + (column << 7) + ((row ^ (column << 1)) << 4)
    take_entries = place.list + column * (2 * g.entry_bytes)
    selectors = byte_selectors(isa, g, row)
    half_slot = STEP_BYTES // 2

    def copy_step(step: Value, slot: Value) -> None:
        (even, *_), (odd, *_) = load_entry_pair(isa, g, copy_entries + step * stride)
        isa.copy_async(copy_to + slot, copy_from + isa.widen(even))
        isa.copy_async(copy_to + slot + half_slot, copy_from + isa.widen(odd))

    def body(step: Value, accumulators: list[Value]) -> list[Value]:
        isa.wait_copies(slots - 2)
        isa.warp_barrier()  # The step's data is visible, and the slot of the last step is free.
        ahead = step + (slots - 1)
        with isa.when(ahead < steps):
            copy_step(ahead, (ahead & (slots - 1)) * STEP_BYTES)
        isa.commit_copies()
        slot = take_from + (step & (slots - 1)) * STEP_BYTES
        even, odd = isa.load_shared(slot, 4), isa.load_shared(slot + half_slot, 4)
        entries = load_entry_pair(isa, g, take_entries + step * stride)
        return multiply(isa, g, accumulators, even, odd, entries, selectors)

    for d in range(slots - 1):
        with isa.when(isa.constant(d) < steps):
            copy_step(isa.constant(d), isa.constant(d * STEP_BYTES))
        isa.commit_copies()
    zeros = [isa.constant(0)] * (32 * g.rows_per_cta)
    accumulators = isa.loop(steps, zeros, body)
    isa.wait_copies(0)
    isa.warp_barrier()  # The scales are visible, the ring is free.
    return accumulators


def load_entry_pair(isa: Instructions, g: Geometry, address: Value) -> tuple[list[Value], list[Value]]:
    """Two consecutive list entries."""
    if g.entry_words == 2:
        words = isa.load_shared(address, 4)
        return words[:2], words[2:]
    return isa.load_shared(address, 4), isa.load_shared(address + g.entry_bytes, 4)


def byte_selectors(isa: Instructions, g: Geometry, column: Value) -> list[Value]:
    """For even and odd activation rows: the byte permutation that makes B's register from a code.

    Column ``2 b`` of B wants, at byte position ``b``, the high byte of the code, column ``2 b + 1`` the low
    one; zeros (selector 4) elsewhere. The code lies in the low or the high half of the entry's word.
    """
    shift = (column >> 1) << 2
    high = (column & 1) ^ 1
    elsewhere = isa.constant(0x4444) ^ (isa.constant(4) << shift)
    selectors = [elsewhere | (high << shift)]
    if g.rows_per_cta > 1:
        selectors.append(elsewhere | ((high + 2) << shift))
    return selectors


def multiply(
    isa: Instructions,
    g: Geometry,
    accumulators: list[Value],
    even: list[Value],
    odd: list[Value],
    entries: tuple[list[Value], list[Value]],
    selectors: list[Value],
) -> list[Value]:
    """One step: ``even`` and ``odd`` are 4 packed words each of this lane's two list rows."""
    zero = isa.constant(0)
    b = []
    for r in range(g.rows_per_cta):
        codes = [entry[1 + r // 2] for entry in entries]
        b.append([isa.permute_bytes(code, zero, selectors[r % 2]) for code in codes])
    out = list(accumulators)
    for half in range(2):
        for p, mask in enumerate(POSITION_MASKS):
            low, high = 2 * half, 2 * half + 1
            a = [even[low] & mask, even[high] & mask, odd[low] & mask, odd[high] & mask]
            for r in range(g.rows_per_cta):
                at = accumulator(r, half, p)
                out[at : at + 4] = isa.matrix_multiply_add(out[at : at + 4], a, b[r])
    return out


def accumulator(row: int, half: int, position: int) -> int:
    """Index of the first of the four accumulators of this row, word group and digit position."""
    return 32 * row + 16 * half + 4 * position


def combine(
    isa: Instructions, g: Geometry, place: Place, accumulators: list[Value], row: int
) -> dict[tuple[int, int, int], Value]:
    """f32 ``[half, word, p]``: what this warp adds to 16 outputs of this lane, not yet scaled.

    Lane ``4 row + column`` has the outputs of words ``4 row + 2 half + word``, byte ``column``, digit ``p``.
    """
    sum_of_codes, peak = isa.load_shared(place.record + 8 * row, 2)
    grid = isa.bits_to_float(peak) * (1.0 / PEAK_CODE)
    middle = isa.int_to_float(sum_of_codes) * grid * -MEAN_DIGIT
    grids = [grid * 4.0**-p for p in range(4)]
    outputs = {}
    for half in range(2):
        for p in range(4):
            at = accumulator(row, half, p)
            for word in range(2):
                high, low = accumulators[at + 2 * word : at + 2 * word + 2]
                digits = isa.int_to_float((high << 8) + low)
                outputs[half, word, p] = isa.multiply_add(digits, grids[p], middle)
    return outputs


def reduce(
    isa: Instructions,
    g: Geometry,
    refs: Refs,
    place: Place,
    outputs: dict[tuple[int, int, int], Value],
    row: int,
) -> None:
    """Scales and sums one activation row over the CTA's warps, in their order, and writes the partial sum.

    By way of the rings, in the order of the outputs but for a swizzle (see ``swizzled``) that keeps lanes
    from meeting in a bank: a lane stores single outputs, and takes four consecutive ones of every warp.
    """
    if row:
        isa.block_barrier()  # The sums of the previous row have been read.
    lane_row, column = place.lane >> 2, place.lane & 3
    group = (lane_row << 2) + (column >> 1)
    mine = swizzled(group << 4, group) + ((column & 1) << 2)
    chunk_bytes = LANES * 16
    for (half, word, p), value in outputs.items():
        flips = 32 * word + 8 * (p & 1)
        isa.store_shared(place.ring + (mine ^ flips) + chunk_bytes * (2 * half + p // 2), [value])
    isa.block_barrier()
    group_row = place.slice_group * g.rows + place.first_row + row
    storing = place.thread < layout.TILE // 4
    if g.rows % g.rows_per_cta:
        storing = storing & (place.first_row + row < g.rows)
    with isa.when(storing):
        theirs = swizzled(place.thread << 4, place.thread)
        total = None
        for warp in range(g.config.warps):
            ring = place.shared + (g.ring_base + warp * g.ring_bytes)
            values = [v for flip in (0, 8) for v in isa.load_shared(ring + (theirs ^ flip), 2, "f32")]
            scales = place.shared + (g.scales_base + warp * SCALES_BYTES) + (place.thread << 3)
            scales = [
                isa.half_to_float(w, which) for w in isa.load_shared(scales, 2) for which in ("low", "high")
            ]
            if total is None:
                total = [v * s for v, s in zip(values, scales, strict=True)]
            else:
                total = [isa.multiply_add(v, s, t) for v, s, t in zip(values, scales, total, strict=True)]
        output = group_row * g.stored_n + place.tile * layout.TILE + (place.thread << 2)
        isa.store_global(isa.global_address(refs.partials) + (isa.widen(output) << 2), total)


def swizzled(offset: Value, group: Value) -> Value:
    """Byte ``offset`` of outputs ``4 group .. + 3``: bits 3 and 4 of ``group`` flip bits 5 and 3 of it, so
    that the 32 outputs of one store, which differ in bits 0, 2, 3, 4 of their group and in bit 0 of their
    number, lie in 32 banks."""
    return offset ^ (((group >> 3) & 1) << 5) ^ (((group >> 4) & 1) << 3)


def count_levels(isa: Instructions, g: Geometry, refs: Refs) -> None:
    """Mean bits read of one activation row: ``2 / in_features`` times the sum of its channels' levels."""
    thread, row = isa.thread_index(), isa.block_index() - g.matvec_blocks
    x = isa.global_address(refs.x)
    thresholds = load_thresholds(isa, g, refs, row)
    at_once = g.threads * COUNT_UNROLL

    def body(i: Value, carry: list[Value]) -> list[Value]:
        (count,) = carry
        for u in range(COUNT_UNROLL):
            channel = i * at_once + (thread + u * g.threads)
            valid = channel < g.in_features
            element = row * g.in_features + isa.select(valid, channel, isa.constant(0))
            magnitude = isa.absolute(load_activation(isa, g, x + isa.widen(element * g.x_bytes)))
            for t in thresholds:
                reads = ~(magnitude < t) & valid
                count = count + isa.select(reads, isa.constant(1), isa.constant(0))
        return [count]

    (count,) = isa.loop(isa.constant(-(-g.in_features // at_once)), [isa.constant(0)], body)
    shared = isa.shared_address(refs.shared)
    of_warp = isa.reduce_add(count)
    with isa.when((thread & (LANES - 1)).equals(0)):
        isa.store_shared(shared + ((thread >> 5) << 2), [of_warp])
    isa.block_barrier()
    with isa.when(thread.equals(0)):
        total = isa.constant(0)
        for warp in range(g.config.warps):
            total = total + isa.load_shared(shared + 4 * warp)[0]
        bits = isa.int_to_float(total) * (layout.DIGIT_BITS / g.in_features)
        isa.store_global(isa.global_address(refs.bits) + isa.widen(row << 2), [bits])
