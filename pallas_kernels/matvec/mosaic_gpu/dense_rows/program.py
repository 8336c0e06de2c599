"""The lane program of the graded matvec for 5 to 16 activation rows, without lists.

``mosaic_gpu.program`` has the formula, the storage, and the phases of the program for one row. At 8 rows some
row reads 5.1 to 5.8 of the 8 bits of a channel, and at 16 rows 5.6 to 6.4. So a program that multiplies all
plane rows, in the order of storage, multiplies at most 1.6 times as many as one with a list. It still copies
only those that some row reads, and it needs no list, no positions, no padding, and a barrier for every 32
channels only:

    CTA        one or more tiles of outputs, ``groups_per_cta`` groups of channels, all activation rows
    section    the channels of one warp in the program for one row: they share a peak and integer sums
    step       32 channels in one to four planes, which fill one slot of the ring

Phases
======
code      Computes the codes of all activation rows in all channels of the CTA, their sums and peaks. Codes
          are those of the program for one row. A warp codes one row in 128 channels at a time; a lane has
          four channels, so it stores the high bytes of their codes as one word, and the low bytes as another.
          Where a row does not read a plane row, its code is 0. If the codes of all rows are 0, the plane row
          is not marked, and not copied.
copy      Copies the marked plane rows to the ring, ``ring_slots`` steps ahead of the multiplication. The
          place of a row that is not marked keeps old bytes. They are multiplied by 0. In the first steps, the
          first planes are copied before anything is marked.
multiply  Multiplies the steps of a section on the matrix unit, exactly, in int32. The operands of a step
          are loaded before the previous step is multiplied. A warp has one piece of all plane rows. With
          ``DenseRows.warpgroups`` the matrix unit multiplies one plane while the warps prepare the next.
combine   Converts the sums to float32, and adds the sections in their order.
store     Writes the totals of a tile as the CTA's partial sum.

Multiplication
==============
``load_matrices_transposed`` gives a lane two bytes of each of 8 plane rows. Four byte permutations make them
a fragment of A [16 bytes of a piece, 32 channels], whose digit positions are masked as in the program for one
row. B [32 channels, 8] holds the high and the low bytes of four activation rows.

Batch invariance
================
A row of y does not depend on the other rows, and has the same bits as in the program for one row with the
same ``warpgroups`` and ``warps_per_group``. Integer sums are exact, so neither the order of channels nor the
bytes that are multiplied by 0 affect them. All float32 operations follow from the row alone: the peak of a
section, the factors, the addition of sections in their order, and the addition of partial sums.
"""

from contextlib import AbstractContextManager

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.counting import count_levels
from pallas_kernels.matvec.mosaic_gpu.dense_rows.coding import Coder, clear_marks
from pallas_kernels.matvec.mosaic_gpu.dense_rows.combining import (
    combine,
    load_scales,
    new_totals,
    store_partials,
)
from pallas_kernels.matvec.mosaic_gpu.dense_rows.copying import Copies
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import DenseRowsGeometry
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import LaneContext, lane_context
from pallas_kernels.matvec.mosaic_gpu.dense_rows.multiplying import Operands, finish, multiply
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs


def dense_rows_program(isa: Instructions, geometry: DenseRowsGeometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    multiplies = isa.block_index() < geometry.matvec_blocks
    with isa.when(multiplies):
        matvec(isa, geometry, refs)
    with isa.when(~multiplies):
        count_rows(isa, geometry, refs)


def count_rows(isa: Instructions, g: DenseRowsGeometry, refs: Refs) -> None:
    """Computes the statistics of every ``counting_blocks``-th activation row."""
    first = isa.block_index() - g.matvec_blocks

    def body(i: Value, carry: list[Value]) -> list[Value]:
        row = first + i * g.counting_blocks
        with isa.when(row < g.rows):
            count_levels(isa, g, refs, row)
            isa.block_barrier()  # The next row needs the same shared memory.
        return carry

    isa.loop(isa.constant(-(-g.rows // g.counting_blocks)), [], body)


def matvec(isa: Instructions, g: DenseRowsGeometry, refs: Refs) -> None:
    """Runs the phases in a CTA that multiplies."""
    context = lane_context(isa, g, refs)
    copies = code_and_start(isa, g, refs, context)
    operands = Operands.create(isa, g, context)
    isa.wait_copies(g.slots - 1)
    isa.block_barrier()  # Now the codes and step 0 are visible.
    zero = isa.constant(0)
    scales = load_scales(isa, g, refs, context, zero) if g.loads_scales_ahead else []
    carry = [*scales, *operands.load(zero, zero, 0)]

    def multiply_tile(tile: Value, carry: list[Value]) -> list[Value]:
        def body(section: Value, carry: list[Value]) -> list[Value]:
            item = tile * g.sections + section
            return multiply_section(isa, g, refs, context, copies, operands, item, section, carry)

        count = len(carry)
        carry = isa.loop(isa.constant(g.sections), carry + new_totals(isa, g), body)
        store_partials(isa, g, refs, context, tile, carry[count:])
        return carry[:count]

    if g.dense.tiles == 1:
        multiply_tile(zero, carry)
    else:
        isa.loop(context.tiles, carry, multiply_tile)
    isa.wait_copies(0)


def code_and_start(isa: Instructions, g: DenseRowsGeometry, refs: Refs, context: LaneContext) -> Copies:
    """Codes all channels of the CTA, and starts copying the first steps as soon as their rows are marked."""
    coder = Coder.create(isa, g, refs, context)
    clear_marks(isa, g, context)
    isa.block_barrier()
    copies = Copies.create(isa, g, refs, context)
    copies.start_early()
    with own_block(isa, context):
        coder.code(range(1))
    isa.block_barrier()
    copies.start(range(g.first_steps))
    with own_block(isa, context):
        coder.code(range(1, g.rounds))
    if g.dense.warpgroups:
        isa.publish_operands()
    if g.rounds > 1:
        isa.block_barrier()
    copies.start(range(g.first_steps, g.slots))
    return copies


def own_block(isa: Instructions, context: LaneContext) -> AbstractContextManager[None]:
    """Runs the body in every lane, behind a condition that the compiler does not know to hold.

    The compiler orders the instructions between two branches as it likes. Without these branches it computes
    before it has started all loads of activations, and delays copies of weights until other rows are coded.
    """
    return isa.when(context.shared >= 0)


def multiply_section(
    isa: Instructions,
    g: DenseRowsGeometry,
    refs: Refs,
    context: LaneContext,
    copies: Copies,
    operands: Operands,
    item: Value,
    section: Value,
    carry: list[Value],
) -> list[Value]:
    """Multiplies one section in one tile, and adds its outputs to the totals.

    Args:
      isa, g, refs, context, copies, operands: The instructions, sizes, arrays, indices, copies and loads.
      item: Index of the item: of the section, after the sections of the tiles before.
      section: Index of the section.
      carry: Scales of the section if they are loaded ahead, operands of step 0, totals.

    Returns:
      The same for the next item.
    """
    next_scales: list[Value] = []
    if g.loads_scales_ahead:
        scales, carry = carry[:4], carry[4:]
        next_scales = load_scales(isa, g, refs, context, item + 1)
    else:
        scales = load_scales(isa, g, refs, context, item)
    count = len(carry) - len(new_totals(isa, g))
    loaded, totals = carry[:count], carry[count:]
    accumulators = [isa.constant(0)] * (16 * g.row_tiles)
    section_codes = operands.section_codes(section) if g.dense.warpgroups else None
    for step in range(len(g.steps)):
        # The operands of this step are in registers, so its slot is free after the barrier.
        isa.wait_copies(g.slots - 2)
        isa.block_barrier()
        after, next_step = divmod(step + 1, len(g.steps))
        next_loaded = operands.load(item + after, (section + after) % g.sections, next_step)
        copies.copy_ahead(item, step)
        accumulators = multiply(isa, g, accumulators, step, loaded, section_codes)
        loaded = next_loaded
    accumulators = finish(isa, g, accumulators)
    totals = combine(isa, g, context, section, accumulators, scales, totals)
    return [*next_scales, *loaded, *totals]
