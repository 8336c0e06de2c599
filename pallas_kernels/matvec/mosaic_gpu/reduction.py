"""Phases combine and reduce: from integer sums of a warp to a partial sum of the CTA."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.geometry import SCALES_BYTES, Geometry
from pallas_kernels.matvec.mosaic_gpu.listing import PEAK_CODE
from pallas_kernels.matvec.mosaic_gpu.place import COPY_BYTES, Place, Refs, stored_slice
from pallas_kernels.matvec.mosaic_gpu.streaming import accumulator

MEAN_DIGIT = 1.5
"""What the midpoint of a level subtracts from every digit read."""


@dataclasses.dataclass(frozen=True)
class EndAddresses:
    """What combine and reduce need to know of their place. Computed before the loop, where nothing waits for
    it; behind the loop the last warp is alone, and the launch waits for each of its instructions."""

    record: Value
    """The warp's record."""
    mine: Value
    """In the warp's ring, where this lane puts its outputs."""
    theirs: Value
    """In the first warp's ring, the outputs that this thread sums over the warps."""
    scales: Value
    """In the first warp's scales, those of the same outputs."""
    output: Value
    """Index of these outputs in the partial sums of the CTA's first row."""


def end_addresses(isa: Instructions, g: Geometry, place: Place) -> EndAddresses:
    """See ``EndAddresses``; outputs pass through the rings in the order of the outputs, ``swizzled``."""
    lane_row, column = place.lane >> 2, place.lane & 3
    group = (lane_row << 2) + (column >> 1)
    mine = swizzled(group << 4, group) + ((column & 1) << 2)
    each = g.outputs_per_thread
    group = (place.thread * each) >> 2
    theirs = swizzled(group << 4, group)
    if each == 2:
        theirs = theirs ^ ((place.thread & 1) << 3)
    group_row = place.slice_group * g.rows + place.first_row
    output = group_row * g.stored_n + place.tile * layout.TILE + place.thread * each
    addresses = (
        place.record,
        place.ring + mine,
        place.shared + g.ring_base + theirs,
        place.shared + g.scales_base + place.thread * (2 * each),
        output,
    )
    # Each from its own lane: ptxas moves anything but a shuffle behind the loop, where it is to be used.
    return EndAddresses(*(isa.shuffle_xor(address, 0) for address in addresses))


def copy_scales(isa: Instructions, g: Geometry, refs: Refs, place: Place) -> None:
    """Starts copying the warp's 512 scales to shared memory, in the group of whatever is copied next.

    In registers they would cost the loop 8 of them, and with those the sixth CTA on a multiprocessor.
    """
    first = (stored_slice(isa, g, place) * g.stored_n + place.tile * layout.TILE) << 1
    source = isa.global_address(refs.scales) + isa.widen(first + (place.lane << 4))
    for part in range(SCALES_BYTES // (LANES * COPY_BYTES)):
        offset = part * LANES * COPY_BYTES
        isa.copy_async(place.scales + offset + (place.lane << 4), source + offset, once=True)


def combine(
    isa: Instructions, g: Geometry, ends: EndAddresses, accumulators: list[Value], row: int
) -> dict[tuple[int, int, int], Value]:
    """f32 ``[half, word, p]``: what this warp adds to 16 outputs of this lane, not yet scaled.

    Lane ``4 row + column`` has the outputs of words ``4 row + 2 half + word``, byte ``column``, digit ``p``.
    """
    sum_of_codes, peak = isa.load_shared(ends.record + 8 * row, 2)
    grid = isa.bits_to_float(peak) * (1.0 / PEAK_CODE)
    middle = isa.int_to_float(sum_of_codes) * grid * -MEAN_DIGIT
    grids = [grid * 4.0**-p for p in range(4)]
    byte = isa.constant(256)
    outputs = {}
    for half in range(2):
        for word in range(2):
            sums = []
            for p in range(4):
                high, low = accumulators[accumulator(row, half, p) + 2 * word :][:2]
                sums.append(isa.multiply_add(high, byte, low))
            sums[0] = sums[0] - sums[1] - sums[2] - sums[3]
            for p in range(4):
                digits = isa.int_to_float(sums[p])
                outputs[half, word, p] = isa.multiply_add(digits, grids[p], middle)
    return outputs


def reduce(
    isa: Instructions,
    g: Geometry,
    refs: Refs,
    place: Place,
    ends: EndAddresses,
    outputs: dict[tuple[int, int, int], Value],
    row: int,
) -> None:
    """Scales and sums one activation row over the CTA's warps, in their order, and writes the partial sum.

    By way of the rings, in the order of the outputs but for a swizzle (see ``swizzled``) that keeps lanes
    from meeting in a bank: a lane stores single outputs, and takes four consecutive ones of every warp.
    """
    if row:
        isa.block_barrier()  # The sums of the previous row have been read.
    chunk_bytes = LANES * 16
    for (half, word, p), value in outputs.items():
        flips = 32 * word + 8 * (p & 1)  # Rings are aligned, so the whole address can be flipped.
        isa.store_shared((ends.mine ^ flips) + chunk_bytes * (2 * half + p // 2), [value])
    isa.block_barrier()
    each = g.outputs_per_thread
    storing = isa.constant(True, "bool")
    if g.rows % g.rows_per_cta:
        storing = place.first_row + row < g.rows
    with isa.when(storing):
        total = None
        for warp in range(g.config.warps):
            theirs = ends.theirs + warp * g.ring_bytes
            values = [v for i in range(each // 2) for v in isa.load_shared(theirs ^ 8 * i, 2, "f32")]
            words = isa.load_shared(ends.scales + warp * SCALES_BYTES, each // 2)
            scales = [isa.half_to_float(word, which) for word in words for which in ("low", "high")]
            if total is None:
                total = [v * s for v, s in zip(values, scales, strict=True)]
            else:
                total = [isa.multiply_add(v, s, t) for v, s, t in zip(values, scales, total, strict=True)]
        output = isa.widen(ends.output + row * g.stored_n) << 2
        isa.store_global(isa.global_address(refs.partials) + output, total)


def swizzled(offset: Value, group: Value) -> Value:
    """Byte ``offset`` of outputs ``4 group .. + 3``: bits 3 and 4 of ``group`` flip bits 5 and 3 of it, so
    that the 32 outputs of one store, which differ in bits 0, 2, 3, 4 of their group and in bit 0 of their
    number, lie in 32 banks."""
    return offset ^ (((group >> 3) & 1) << 5) ^ (((group >> 4) & 1) << 3)
