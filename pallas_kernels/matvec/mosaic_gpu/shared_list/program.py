"""The lane program of the graded matvec for 2 to 16 activation rows."""

from pallas_kernels.lanes.instructions import Instructions, Value
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
        isa.block_barrier()  # The codes and records of the previous section have been read.
        store_codes(isa, g, refs, context, section)
        accumulators = stream(isa, g, context, copies, first, section_steps, steps)
        combine(isa, g, context, accumulators, scales)
        return [first + section_steps]

    isa.loop(isa.constant(g.sections), [isa.constant(0)], body)
    isa.wait_copies(0)
    store_partials(isa, g, refs, context)
