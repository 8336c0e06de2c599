"""Phases combine and reduce: from the integer sums of a warp to a partial sum of the CTA.

The outputs of a warp pass through its ring, which has an array for each activation row. Number the outputs of
the warp ``n``, in their order, and let ``h`` be 1 in the upper half of the tile and ``o`` in odd activation
rows, else 0. Output ``n`` is element ``n ^ 16 h ^ 2 o`` of the array. Then no store of ``combine`` has bank
conflicts. In the array every tile has 4 chunks of 128 outputs, or of 64 with two warps for a section. If the
tile has fewer pieces, only the first outputs of each chunk exist.
"""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.geometry import ROWS_PER_MATRIX, BytePairGeometry
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.streaming import accumulator
from pallas_kernels.matvec.mosaic_gpu.geometry import SCALES_BYTES
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
    """Index of those outputs in the partial sums of the thread's first row; -1 if the tile lacks them."""


def end_addresses(isa: Instructions, g: BytePairGeometry, context: LaneContext) -> EndAddresses:
    """Computes the addresses.

    Lane ``4 r + c`` has byte ``c % 2`` of byte pair ``r`` of the warp's pieces, for activation rows
    ``c // 2, c // 2 + 2``. By ``layout``, digit position ``p`` of that byte of piece ``q`` is output
    ``256 (r // 4) + 128 (p // 2) + 16 q + 4 (r % 4) + 2 (p % 2) + c % 2``.
    """
    r, c = context.lane >> 2, context.lane & 3
    half, row = r >> 2, c >> 1
    first = (half * (256 // g.warps_per_section) + ((r & 3) << 2) + (c & 1)) ^ (half << 4) ^ (row << 1)
    record = context.record
    if g.shares_codes:
        assert context.part is not None
        record = record - context.part * g.record_bytes
    threads = g.threads // g.warps_per_section
    own = (context.thread % threads) * g.outputs_per_thread
    loads = (own ^ ((own >> 8) << 4)) << 2
    output = (context.split * g.rows + context.first_row) * g.stored_n + context.tile * layout.TILE
    if g.warps_per_section == 2:
        # Outputs 64 to 127 of 128 are those of the section's second warp. The second half of the threads sums
        # the odd activation rows.
        row_of_thread = context.thread // threads
        element = ((own & 63) | ((own >> 7) << 6)) ^ ((own >> 8) << 4) ^ (row_of_thread << 1)
        loads = ((own >> 6) & 1) * g.ring_bytes + (element << 2)
        if g.rows_per_cta > 1:
            loads = loads + row_of_thread * g.output_bytes
        output = output + row_of_thread * g.stored_n
    if context.pieces is None:
        place, output = own, output + own
    else:
        place, exists = stored_output(isa, own, context.pieces)
        output = isa.select(exists, output + place, isa.constant(-1))
    addresses = (
        record + (row << 3),
        context.ring + row * g.output_bytes + (first << 2),
        context.shared + g.ring_base + loads,
        context.shared + g.scales_base + (place << 1),
        output,
    )
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
            for i in range(g.piece_pairs):
                for q in range(2):
                    sums = [accumulators[accumulator(g, pair, i, p) + 2 * q :][:2] for p in range(4)]
                    for p, output in enumerate(conversion.outputs(isa, sums)):
                        array = ROWS_PER_MATRIX * g.output_bytes * pair
                        offset = array + 128 * i + g.output_bytes // 4 * (p // 2)
                        isa.store_shared(flipped[q, p % 2] + offset, [output])


def reduce(
    isa: Instructions, g: BytePairGeometry, refs: Refs, context: LaneContext, ends: EndAddresses
) -> None:
    """Scales the outputs, sums them over the CTA's sections in a fixed order, and stores the partial sums."""
    isa.block_barrier()
    each = g.outputs_per_thread
    rows = range(0, g.rows_per_cta, g.warps_per_section)
    totals: list[list[Value]] = []
    for section in range(g.sections):
        words = isa.load_shared(ends.scales + section * SCALES_BYTES, each // 2)
        scales = [isa.half_to_float(word, half) for word in words for half in ("low", "high")]
        for i, row in enumerate(rows):
            address = ends.loads + (section * g.warps_per_section * g.ring_bytes + row * g.output_bytes)
            if g.warps_per_section == 1 and row % 2:
                address = address ^ 8
            pairs = [isa.load_shared(address ^ (8 * j), 2, "f32") for j in range(each // 2)]
            values = [v for pair in pairs for v in pair]
            if not section:
                totals.append([v * s for v, s in zip(values, scales, strict=True)])
            else:
                terms = zip(values, scales, totals[i], strict=True)
                totals[i] = [isa.multiply_add(v, s, t) for v, s, t in terms]
    for row, total in zip(rows, totals, strict=True):
        storing = stores_row(isa, g, context, row)
        if context.pieces is not None:
            storing = storing & (ends.output >= 0)
        with isa.when(storing):
            output = isa.widen(ends.output + row * g.stored_n) << 2
            isa.store_global(isa.global_address(refs.partials) + output, total)


def stores_row(isa: Instructions, g: BytePairGeometry, context: LaneContext, row: int) -> Value:
    """Returns whether the thread has outputs of activation row ``row``, or of the next if it has odd rows."""
    if g.warps_per_section == 1:
        last, first = row, context.first_row
    else:
        last, first = row + 1, context.first_row + isa.thread_index() // (g.threads // 2)
    # Only the last batch may have fewer rows than ``rows_per_cta``.
    if g.rows % g.rows_per_cta == 0 and last < g.rows_per_cta:
        return isa.constant(True, "bool")
    return first + row < g.rows
