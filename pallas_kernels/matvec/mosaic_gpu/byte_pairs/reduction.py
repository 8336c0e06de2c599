"""Phases combine and reduce: from the integer sums of a warp to a partial sum of the CTA.

The outputs of a warp pass through its ring, which has an array of 512 for each activation row. Output ``n``
is element ``n ^ 16 (n // 256)`` of the array, or ``n ^ 16 (n // 256) ^ 2`` in odd activation rows. Then no
store of ``combine`` has bank conflicts. In the array every tile has 4 chunks of 128 outputs; if the tile has
fewer pieces, only the first outputs of each chunk exist.
"""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.geometry import (
    PIECE_PAIRS,
    ROWS_PER_MATRIX,
    BytePairGeometry,
)
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.streaming import accumulator
from pallas_kernels.matvec.mosaic_gpu.geometry import SCALES_BYTES, TILE_OUTPUT_BYTES
from pallas_kernels.matvec.mosaic_gpu.lane_context import LaneContext, Refs
from pallas_kernels.matvec.mosaic_gpu.reduction import Conversion
from pallas_kernels.matvec.mosaic_gpu.tile import stored_output


@dataclasses.dataclass(frozen=True)
class EndAddresses:
    """Addresses that ``combine`` and ``reduce`` use, computed before the loop (see ``reduction``)."""

    record: Value
    """Address of the record of the lane's first activation row."""
    stores: Value
    """Address in the warp's ring of the lane's first output of its first activation row."""
    loads: Value
    """Address in the first warp's ring of the outputs that this thread sums over the warps."""
    scales: Value
    """Address in the first warp's scales of the scales of those outputs."""
    output: Value
    """Index of those outputs in the partial sums of the CTA's first row; -1 if the tile lacks them."""


def end_addresses(isa: Instructions, g: BytePairGeometry, context: LaneContext) -> EndAddresses:
    """Computes the addresses.

    Lane ``4 r + c`` has byte ``c % 2`` of byte pair ``r`` of every piece, for activation rows
    ``c // 2, c // 2 + 2``. By ``layout``, digit position ``p`` of that byte of piece ``q`` is output
    ``256 (r // 4) + 128 (p // 2) + 16 q + 4 (r % 4) + 2 (p % 2) + c % 2``.
    """
    r, c = context.lane >> 2, context.lane & 3
    half, row = r >> 2, c >> 1
    first = ((half << 8) + ((r & 3) << 2) + (c & 1)) ^ (half << 4) ^ (row << 1)
    each = g.outputs_per_thread
    own = context.thread * each
    partial_row = context.split * g.rows + context.first_row
    place, exists = own, None
    if context.pieces is not None:
        place, exists = stored_output(isa, own, context.pieces)
    addresses = [
        context.record + (row << 3),
        context.ring + row * TILE_OUTPUT_BYTES + (first << 2),
        context.shared + g.ring_base + ((own ^ ((own >> 8) << 4)) << 2),
        context.shared + g.scales_base + (place << 1),
        partial_row * g.stored_n + context.tile * layout.TILE + place,
    ]
    if exists is not None:
        addresses[-1] = isa.select(exists, addresses[-1], isa.constant(-1))
    # The shuffles keep ptxas 13.0 from moving these computations behind the loop.
    return EndAddresses(*(isa.shuffle_xor(address, 0) for address in addresses))


def combine(isa: Instructions, g: BytePairGeometry, ends: EndAddresses, accumulators: list[Value]) -> None:
    """Converts the sums of all activation rows to float32 and stores them in the warp's ring."""
    flipped = {(q, p): ends.stores ^ (64 * q + 8 * p) for q in range(2) for p in range(2)}
    for pair in range(g.row_pairs):
        # An odd number of rows leaves half of the lanes without a row. They must not store.
        exists = isa.constant(True, "bool")
        if ROWS_PER_MATRIX * (pair + 1) > g.rows_per_cta:
            exists = (isa.thread_index() & 2).equals(0)
        with isa.when(exists):
            sum_of_codes, peak = isa.load_shared(ends.record + 16 * pair, 2)
            conversion = Conversion.create(isa, sum_of_codes, isa.bits_to_float(peak))
            for i in range(PIECE_PAIRS):
                for q in range(2):
                    sums = [accumulators[accumulator(pair, i, p) + 2 * q :][:2] for p in range(4)]
                    for p, output in enumerate(conversion.outputs(isa, sums)):
                        offset = ROWS_PER_MATRIX * TILE_OUTPUT_BYTES * pair + 128 * i + 512 * (p // 2)
                        isa.store_shared(flipped[q, p % 2] + offset, [output])


def reduce(
    isa: Instructions, g: BytePairGeometry, refs: Refs, context: LaneContext, ends: EndAddresses
) -> None:
    """Scales the outputs, sums them over the CTA's warps in a fixed order, and stores the partial sums."""
    isa.block_barrier()
    each = g.outputs_per_thread
    totals: list[list[Value]] = []
    for warp in range(g.config.warps):
        words = isa.load_shared(ends.scales + warp * SCALES_BYTES, each // 2)
        scales = [isa.half_to_float(word, half) for word in words for half in ("low", "high")]
        for row in range(g.rows_per_cta):
            address = ends.loads + (warp * g.ring_bytes + row * TILE_OUTPUT_BYTES)
            if each == 4:
                values = isa.load_shared(address, 4, "f32")
                values = values[2:] + values[:2] if row % 2 else values
            else:
                values = isa.load_shared(address ^ 8 if row % 2 else address, 2, "f32")
            if not warp:
                totals.append([v * s for v, s in zip(values, scales, strict=True)])
            else:
                terms = zip(values, scales, totals[row], strict=True)
                totals[row] = [isa.multiply_add(v, s, t) for v, s, t in terms]
    for row, total in enumerate(totals):
        storing = isa.constant(True, "bool")
        if g.rows % g.rows_per_cta:
            storing = context.first_row + row < g.rows
        if context.pieces is not None:
            storing = storing & (ends.output >= 0)
        with isa.when(storing):
            output = isa.widen(ends.output + row * g.stored_n) << 2
            isa.store_global(isa.global_address(refs.partials) + output, total)
