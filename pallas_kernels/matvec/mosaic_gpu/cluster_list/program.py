"""The lane program of the graded matvec whose clusters divide the channels, for several activation rows.

``shared_list.program`` has the multiplication: all warps of a CTA share one list, and each multiplies one or
two 16-byte pieces of every listed plane row with both bytes of the codes of all activation rows. In that
program a CTA has as many channels as in the program for one row, so a launch may have fewer CTAs than the
device has multiprocessors, and two warps for each scheduler, which often has none that is ready. Here

    cluster    1, 2 or 4 tiles of outputs, ``groups_per_cta`` groups of channels, all activation rows
    CTA        1, 2, 4 or 8 of them in a cluster: an equal number of the cluster's sections
    pass       one tile and one section of the CTA. All tiles have the same list, except for the offset of the
               tile, and share the codes

A CTA has fewer codes, so several CTAs fit a multiprocessor, and the grid fills the device.

Phases
======
list      Every warp loads and grades activations of a segment of the channels, lists the plane rows that some
          activation row reads, and finds the peaks. Sections are padded to whole steps. ``segment_parts``
          warps divide the activation rows if segments are few.
code      Every warp stores the codes of its segment and rows, for all sections before the first
          multiplication. It needs no load from global memory.
stream    Copies the listed rows to the ring, ``ring_slots - 1`` steps ahead of the multiplication, also over
          the ends of passes and during the phase code.
multiply  Multiplies the steps of a pass on the matrix unit, exactly, in int32.
combine   Converts the sums of a pass to float32 and stores them in shared memory.
reduce    Every CTA of the cluster takes some of the outputs, scales them, and adds them over the sections of
          all CTAs in the order of the sections. It reads the shared memory of the other CTAs.

Batch invariance
================
A row of y has the same bits as in the program for one row with the same ``warpgroups`` and
``warps_per_group``, among any other rows, for the reasons in ``shared_list.program``.
"""

from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.cluster_list.coding import load_gains, store_codes
from pallas_kernels.matvec.mosaic_gpu.cluster_list.combining import combine, copy_scales, reduce
from pallas_kernels.matvec.mosaic_gpu.cluster_list.geometry import ClusterListGeometry
from pallas_kernels.matvec.mosaic_gpu.cluster_list.lane_context import lane_context
from pallas_kernels.matvec.mosaic_gpu.cluster_list.listing import list_rows, segment_of
from pallas_kernels.matvec.mosaic_gpu.counting import count_levels
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.shared_list.streaming import Copies, stream


def cluster_list_program(isa: Instructions, geometry: ClusterListGeometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    block = isa.block_index()
    with isa.when(block < geometry.matvec_blocks):
        matvec(isa, geometry, refs)
    counts = block >= geometry.matvec_blocks
    if geometry.rows % geometry.cluster:
        counts = counts & (block < geometry.matvec_blocks + geometry.rows)
    with isa.when(counts):
        count_levels(isa, geometry, refs)


def matvec(isa: Instructions, g: ClusterListGeometry, refs: Refs) -> None:
    """Runs the phases in a CTA that multiplies."""
    context = lane_context(isa, g, refs)
    segment = segment_of(g, context)
    gains = load_gains(isa, g, refs)
    share, listed = list_rows(isa, g, refs, context, segment)
    copy_scales(isa, g, refs, context)
    copies = Copies.create(isa, g, refs, context)
    steps = listed.list_steps * g.tiles_per_cta
    copies.fill_ring(steps)
    store_codes(isa, g, context, segment, share, listed, gains)

    def body(i: Value, carry: list[Value]) -> list[Value]:
        first, list_first = carry
        section = i % g.sections
        _, size = isa.load_shared(context.shared + g.sections_base + (section << 3), 2)
        section_steps = isa.reduce_max(size) // g.step_entries
        accumulators = stream(isa, g, context, copies, first, section_steps, steps, list_first)
        isa.block_barrier()  # Now the ring is free, for the outputs of the last pass.
        combine(isa, g, context, section, i, accumulators)
        is_last = section.equals(g.sections - 1)
        next_first = isa.select(is_last, isa.constant(0), list_first + section_steps)
        return [first + section_steps, next_first]

    isa.loop(isa.constant(g.passes), [isa.constant(0)] * 2, body)
    isa.wait_copies(0)
    reduce(isa, g, refs, context)
