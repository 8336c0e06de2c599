"""The lane program of the graded matvec that multiplies pairs of bytes, for several activation rows.

``mosaic_gpu.program`` has the formula, the storage, and the phases. In that program a register of the operand
A holds four bytes of one plane row, which are four different outputs. So three quarters of B are zeros, and
every activation row takes a matrix instruction for 8 plane rows. Here a register of A holds a pair of
neighbouring bytes of two plane rows. Half of B are zeros, and one instruction takes 16 plane rows and two
activation rows:

    step       16 plane rows = 2 KiB, which fill one slot of the warp's ring buffer in shared memory
    A          [16 pairs of bytes of a plane row, 32 = 16 plane rows x 2 bytes]
    B          [32, 8]: four columns for each of two activation rows: the high bytes and the low bytes of the
               codes in the rows of B for even bytes, and the same in the rows for odd bytes
    C          [16, 8]: a lane has the sums of high and of low bytes for one byte of a pair

``load_matrices_transposed`` loads a whole fragment of A: its four matrices are two 16-byte pieces of 8 plane
rows each. The digit positions are masked as in the other program. Two activation rows take 64 accumulators of
every lane, four rows take 128.

Warps and CTAs have the same channels as in ``mosaic_gpu.program``, and convert and add the same numbers in
the same order. So a row of y has the same bits in both programs, among any other rows, if ``warpgroups`` and
``warps_per_group`` are equal.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.geometry import BytePairGeometry
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.reduction import combine, end_addresses, reduce
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.streaming import Copies, stream
from pallas_kernels.matvec.mosaic_gpu.counting import count_levels
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs, lane_context
from pallas_kernels.matvec.mosaic_gpu.listing import (
    RowList,
    compact,
    fetch,
    grade,
    list_first_plane,
    store_record,
)
from pallas_kernels.matvec.mosaic_gpu.reduction import copy_scales


def byte_pair_program(isa: Instructions, geometry: BytePairGeometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    multiplies = isa.block_index() < geometry.matvec_blocks
    with isa.when(multiplies):
        matvec(isa, geometry, refs)
    with isa.when(~multiplies):
        count_levels(isa, geometry, refs)


def matvec(isa: Instructions, g: BytePairGeometry, refs: Refs) -> None:
    """Runs the phases in a CTA that multiplies."""
    context = lane_context(isa, g, refs)
    operands = fetch(isa, g, refs, context)
    copy_scales(isa, g, refs, context)
    first = grade(isa, operands, 0)
    rows = RowList(isa, g, context, end=context.list)
    addresses = list_first_plane(isa, g, rows, first)
    copies = Copies.create(isa, g, refs, context)
    started = copies.start(rows.whole_steps())
    listed = compact(isa, g, operands, first, addresses, rows)
    copies.fill_ring(started, listed.steps)
    store_record(isa, g, context, listed)
    ends = end_addresses(isa, g, context)
    accumulators = stream(isa, g, context, copies, listed.steps)
    combine(isa, g, ends, accumulators)
    reduce(isa, g, refs, context, ends)
