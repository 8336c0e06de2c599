"""The lane program of the graded matvec for 2 to 16 activation rows.

``mosaic_gpu.program`` has the formula, the storage, and the phases of the program for one row. That program
gives every warp a list and every activation row 32 accumulators, and three quarters of its operand B are
zeros. Here all warps of a CTA share one list, and B has no zeros:

    CTA        one tile of outputs, ``groups_per_cta`` groups of channels, all activation rows
    section    the channels of one warp in the program for one row: they share a peak and integer sums. The
               list has the plane rows of one section after the other
    warp       one or two 16-byte pieces of every listed plane row: 64 or 128 outputs
    step       32 or 64 plane rows = 4 or 8 KiB, which fill one slot of the ring buffer of the CTA

Phases
======
list      Lists the plane rows that some activation row reads, for all sections, each padded to whole steps.
stream    Copies the listed rows to the ring, ``ring_slots - 1`` steps ahead of the multiplication, also over
          the ends of sections.
code      For each section: computes the codes of all activation rows, and their peaks and sums. Codes are
          those of the program for one row. High bytes and low bytes of a row lie in two arrays, in the order
          of the list; a row that does not read a listed plane row has the code 0 there.
multiply  Multiplies the steps of the section on the matrix unit, exactly, in int32.
combine   Converts the sums to float32, applies the scales, and adds them to totals in shared memory.
store     Writes the totals as the CTA's partial sum.

Multiplication
==============
``load_matrices_transposed`` gives a lane two bytes of each of 8 listed rows. Four byte permutations make them
a fragment of A [16 bytes of a piece, 32 listed rows], whose digit positions are masked as in the program for
one row. B [32 listed rows, 8] holds the high and the low bytes of four activation rows.

Batch invariance
================
A row of y does not depend on the other rows, and has the same bits as in the program for one row with the
same ``warpgroups`` and ``warps_per_group``. Integer sums are exact, so the list does not affect them. All
float32 operations follow from the row alone: the peak of a section, the factors, the addition of sections in
their order (``reduction.reduce`` adds warps in the same order, with the same instructions), and the addition
of partial sums.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.counting import count_levels
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.shared_list.coding import store_codes
from pallas_kernels.matvec.mosaic_gpu.shared_list.combining import (
    clear_totals,
    combine,
    load_scales,
    store_partials,
)
from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import SharedListGeometry
from pallas_kernels.matvec.mosaic_gpu.shared_list.lane_context import lane_context
from pallas_kernels.matvec.mosaic_gpu.shared_list.listing import list_rows
from pallas_kernels.matvec.mosaic_gpu.shared_list.streaming import Copies, stream


def shared_list_program(isa: Instructions, geometry: SharedListGeometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    multiplies = isa.block_index() < geometry.matvec_blocks
    with isa.when(multiplies):
        matvec(isa, geometry, refs)
    with isa.when(~multiplies):
        count_levels(isa, geometry, refs)


def matvec(isa: Instructions, g: SharedListGeometry, refs: Refs) -> None:
    """Runs the phases in a CTA that multiplies."""
    context = lane_context(isa, g, refs)
    steps = isa.reduce_max(list_rows(isa, g, refs, context))
    copies = Copies.create(isa, g, refs, context)
    copies.fill_ring(steps)
    clear_totals(isa, g, context)

    def body(section: Value, carry: list[Value]) -> list[Value]:
        (first,) = carry
        _, size = isa.load_shared(context.shared + g.sections_base + (section << 3), 2)
        section_steps = isa.reduce_max(size) // g.step_entries
        scales = load_scales(isa, g, refs, context, section)
        isa.block_barrier()  # Now all warps have read the codes and records of the previous section.
        store_codes(isa, g, refs, context, section)
        accumulators = stream(isa, g, context, copies, first, section_steps, steps)
        combine(isa, g, context, accumulators, scales)
        return [first + section_steps]

    isa.loop(isa.constant(g.sections), [isa.constant(0)], body)
    isa.wait_copies(0)
    store_partials(isa, g, refs, context)
