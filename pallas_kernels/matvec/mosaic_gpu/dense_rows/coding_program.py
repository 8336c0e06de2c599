"""The lane program that codes activations for a product with ``DenseRows.coded``.

All CTAs of a product that have the same input channels need the same codes. This launch computes them once,
where 8 to 16 CTAs of a product of Qwen3-8B would. A CTA codes one group of channels as the product would,
with its phase ``code``, into shared memory, and copies the result to the place that the product copies it
from.
"""

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.counting import count_levels
from pallas_kernels.matvec.mosaic_gpu.dense_rows.coding import Coder, clear_marks
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import RECORD_BYTES, CodingGeometry
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import LaneContext
from pallas_kernels.matvec.mosaic_gpu.lane_context import COPY_BYTES, Refs


def coding_program(isa: Instructions, geometry: CodingGeometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    block = isa.block_index()
    codes = block < geometry.coding_blocks
    with isa.when(codes):
        code_group(isa, geometry, refs)
    with isa.when(~codes):
        count_levels(isa, geometry, refs, block - geometry.coding_blocks)


def code_group(isa: Instructions, g: CodingGeometry, refs: Refs) -> None:
    """Codes all rows in the group of the CTA, and stores codes, masks and records."""
    thread, none = isa.thread_index(), isa.constant(0)
    shared = isa.shared_address(refs.shared)
    context = LaneContext(
        thread, thread & (LANES - 1), thread >> 5, none, none, split=isa.block_index(), shared=shared
    )
    coder = Coder.create(isa, g, refs, context)
    clear_marks(isa, g, context)
    isa.block_barrier()
    coder.code(range(1))
    isa.block_barrier()
    store(isa, g, refs, context)


def store(isa: Instructions, g: CodingGeometry, refs: Refs, context: LaneContext) -> None:
    """Copies what the CTA has coded to its part of the coded activations."""
    product, thread = g.product, context.thread
    split, group = context.split // product.cta_groups, context.split % product.cta_groups
    target = isa.global_address(refs.coded) + isa.widen(split * product.records_end)
    codes = target + isa.widen(group * (g.cta_chunks * g.chunk_bytes))
    pieces = g.planes * g.unit_bytes // COPY_BYTES
    for first in range(0, g.cta_chunks * pieces, g.threads):
        piece = thread + first
        offset = piece // pieces * g.chunk_bytes + piece % pieces * COPY_BYTES
        with isa.when(piece < g.cta_chunks * pieces):
            isa.store_global(codes + isa.widen(offset), isa.load_shared(context.shared + offset, 4))
    records_bytes = g.sections * g.padded_rows * RECORD_BYTES
    with isa.when(thread < records_bytes // COPY_BYTES):
        words = isa.load_shared(context.shared + g.records_base + thread * COPY_BYTES, 4)
        place = group * records_bytes + thread * COPY_BYTES + product.records_base
        isa.store_global(target + isa.widen(place), words)
    with isa.when(thread < g.sections * LANES):
        place = (group * (g.sections * LANES) + thread) * 4 + product.masks_base
        isa.store_global(target + isa.widen(place), [marks(isa, g, context)])


def marks(isa: Instructions, g: CodingGeometry, context: LaneContext) -> Value:
    """Returns the word of the thread's channel of a section: see ``DenseRowsGeometry.mark_bit``."""
    section, channel = context.thread >> 5, context.lane
    masks = context.shared + g.masks_base + section * g.section_channels + (channel & ~3)
    byte = isa.constant(0xFF) << ((channel & 3) << 3)
    zero, word = isa.constant(0), isa.constant(0)
    for chunk in range(g.section_chunks):
        for plane in range(g.planes):
            (mask,) = isa.load_shared(masks + (plane * layout.GROUP + chunk * LANES))
            bit = isa.constant(1 << g.mark_bit(chunk, plane))
            word = word | isa.select((mask & byte).equals(0), zero, bit)
    return word
