"""Phases combine and reduce: from the integer sums of a warp to a partial sum of the CTA."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.geometry import SCALES_BYTES, Geometry
from pallas_kernels.matvec.mosaic_gpu.lane_context import (
    COPY_BYTES,
    LaneContext,
    Refs,
    stored_group,
    weight_address,
)
from pallas_kernels.matvec.mosaic_gpu.listing import PEAK_CODE
from pallas_kernels.matvec.mosaic_gpu.streaming import accumulator
from pallas_kernels.matvec.mosaic_gpu.tile import stored_output

MEAN_DIGIT = 1.5
"""Mean of a digit, which is subtracted from every digit that is read (see ``weight.NestedWeight``)."""


PIECE_SCALES_BYTES = layout.PIECE * 2
"""Bytes of the scales of one group in one piece."""


@dataclasses.dataclass(frozen=True)
class EndAddresses:
    """Addresses that ``combine`` and ``reduce`` use.

    They are computed before the loop, where their computation overlaps with copies. After the loop the whole
    launch waits for every instruction of its last warp.
    """

    record: Value
    """Address of the warp's record."""
    stores: Value
    """Address in the warp's ring where this lane stores its outputs."""
    loads: Value
    """Address in the first warp's ring of the outputs that this thread sums over the warps."""
    scales: Value
    """Address in the first warp's scales of the scales of those outputs."""
    output: Value
    """Index of those outputs in the partial sums; -1 if the tile lacks them."""


def end_addresses(isa: Instructions, g: Geometry, context: LaneContext) -> EndAddresses:
    """Computes the addresses. The rings hold outputs in logical order, at ``swizzled`` addresses.

    In the rings every tile has 4 chunks of 128 outputs. If the tile has fewer pieces, only the first outputs
    of each chunk exist.
    """
    lane_row, column = context.lane >> 2, context.lane & 3
    quad = (lane_row << 2) + (column >> 1)
    stores = swizzled(quad << 4, quad) + ((column & 1) << 2)
    each = g.outputs_per_thread
    quad = (context.thread * each) >> 2
    loads = swizzled(quad << 4, quad)
    if each == 2:
        loads = loads ^ ((context.thread & 1) << 3)
    partial_row = context.split * g.rows + context.first_row
    output = partial_row * g.stored_n + context.tile * layout.TILE
    if context.pieces is None:
        output, first = output + context.thread * each, None
    else:
        first, exists = stored_output(isa, context.thread * each, context.pieces)
        output = isa.select(exists, output + first, isa.constant(-1))
    addresses = (
        context.record,
        context.ring + stores,
        context.shared + g.ring_base + loads,
        context.shared + g.scales_base + (context.thread * (2 * each) if first is None else first * 2),
        output,
    )
    # Each lane shuffles with itself, which changes nothing, because ptxas 13.0 would move these computations
    # behind the loop, to their use.
    return EndAddresses(*(isa.shuffle_xor(address, 0) for address in addresses))


def copy_scales(isa: Instructions, g: Geometry, refs: Refs, context: LaneContext) -> None:
    """Starts copying the tile's scales to shared memory; they join the copy group of the first step.

    Held in registers, the scales would take 8 of the loop's registers, and a multiprocessor would have room
    for five CTAs instead of six.
    """
    first = (stored_group(isa, g, context) * g.stored_n + context.tile * layout.TILE) << 1
    scales = weight_address(isa, refs.scales, context, g.weight_scales_bytes)
    source = scales + isa.widen(first + (context.lane << 4))
    for offset in range(0, SCALES_BYTES, LANES * COPY_BYTES):
        target = context.scales + offset + (context.lane << 4)
        if context.pieces is None:
            isa.copy_async(target, source + offset, evict_first=True)
        else:
            exists = (context.lane << 4) + offset < context.pieces * PIECE_SCALES_BYTES
            with isa.when(exists):
                isa.copy_async(target, source + offset, evict_first=True)


def combine(
    isa: Instructions, ends: EndAddresses, accumulators: list[Value]
) -> dict[tuple[int, int, int], Value]:
    """Returns f32 ``[half, word, p]``: the warp's sums for 16 outputs of this lane, not yet scaled.

    Lane ``4 row + column`` has the outputs of words ``4 row + 2 half + word``, byte ``column``, digit ``p``.
    """
    sum_of_codes, peak = isa.load_shared(ends.record, 2)
    conversion = Conversion.create(isa, sum_of_codes, isa.bits_to_float(peak))
    outputs = {}
    for half in range(2):
        for word in range(2):
            pairs = [accumulators[accumulator(half, p) + 2 * word :][:2] for p in range(4)]
            for p, output in enumerate(conversion.outputs(isa, pairs)):
                outputs[half, word, p] = output
    return outputs


def midpoint_and_unit(isa: Instructions, sum_of_codes: Value, peak: Value) -> tuple[Value, Value]:
    """Returns the sum of the midpoints, which is added to every output, and the value of the code 1, f32."""
    unit = peak * (1.0 / PEAK_CODE)
    return isa.int_to_float(sum_of_codes) * unit * -MEAN_DIGIT, unit


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Factors that convert the integer sums of one activation row to float32."""

    midpoint: Value
    """Sum of the midpoints, f32, which is added to every output."""
    units: list[Value]
    """Value of 1 in the integer sums of digit position ``p``, f32 ``[p]``."""
    byte: Value
    """The constant 256."""

    @classmethod
    def create(cls, isa: Instructions, sum_of_codes: Value, peak: Value) -> "Conversion":
        """Computes the factors from the sum of all codes and the peak."""
        return cls.of(isa, *midpoint_and_unit(isa, sum_of_codes, peak))

    @classmethod
    def of(cls, isa: Instructions, midpoint: Value, unit: Value) -> "Conversion":
        """Computes the factors from ``midpoint_and_unit``."""
        return cls(midpoint, [unit * 4.0**-p for p in range(4)], isa.constant(256))

    def outputs(self, isa: Instructions, pairs: list[list[Value]]) -> list[Value]:
        """Returns f32 ``[p]``, the outputs of one byte, from ``[p]`` pairs of sums of high and low bytes."""
        sums = [isa.multiply_add(high, self.byte, low) for high, low in pairs]
        sums[0] = sums[0] - sums[1] - sums[2] - sums[3]
        outputs = []
        for digits, unit in zip(sums, self.units, strict=True):
            outputs.append(isa.multiply_add(isa.int_to_float(digits), unit, self.midpoint))
        return outputs


def reduce(
    isa: Instructions,
    g: Geometry,
    refs: Refs,
    context: LaneContext,
    ends: EndAddresses,
    outputs: dict[tuple[int, int, int], Value],
) -> None:
    """Scales the outputs, sums them over the CTA's warps in a fixed order, and writes the partial sum.

    The outputs pass through the rings: a lane stores single outputs of its warp, and a thread loads
    consecutive outputs of every warp. ``swizzled`` addresses avoid bank conflicts.
    """
    chunk_bytes = LANES * 16
    for (half, word, p), value in outputs.items():
        flips = 32 * word + 8 * (p & 1)  # The rings are aligned, so the address may be flipped as a whole.
        isa.store_shared((ends.stores ^ flips) + chunk_bytes * (2 * half + p // 2), [value])
    isa.block_barrier()
    each = g.outputs_per_thread
    storing = isa.constant(True, "bool") if context.pieces is None else ends.output >= 0
    with isa.when(storing):
        total: list[Value] = []
        for warp in range(g.config.warps):
            address = ends.loads + warp * g.ring_bytes
            values = [v for i in range(each // 2) for v in isa.load_shared(address ^ 8 * i, 2, "f32")]
            words = isa.load_shared(ends.scales + warp * SCALES_BYTES, each // 2)
            scales = [isa.half_to_float(word, half) for word in words for half in ("low", "high")]
            if not total:
                total = [v * s for v, s in zip(values, scales, strict=True)]
            else:
                total = [isa.multiply_add(v, s, t) for v, s, t in zip(values, scales, total, strict=True)]
        output = isa.widen(ends.output) << 2
        isa.store_global(isa.global_address(refs.partials) + output, total)


def swizzled(offset: Value, quad: Value) -> Value:
    """Swizzles the byte offset of outputs ``4 quad .. + 3`` to avoid bank conflicts.

    Bits 3 and 4 of ``quad`` flip bits 5 and 3 of the offset. The 32 outputs of one store differ in bits 0, 2,
    3, 4 of their quad and in bit 0 of their number, so they lie in 32 banks.
    """
    return offset ^ (((quad >> 3) & 1) << 5) ^ (((quad >> 4) & 1) << 3)
