"""The CTAs that count levels."""

from pallas_kernels import layout
from pallas_kernels.matvec.mosaic_gpu.geometry import LANES, Geometry
from pallas_kernels.matvec.mosaic_gpu.instructions import Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.listing import load_activation, load_thresholds
from pallas_kernels.matvec.mosaic_gpu.place import Refs

COUNT_UNROLL = 32
"""Activations that a lane loads at once when it counts levels."""


def count_levels(isa: Instructions, g: Geometry, refs: Refs) -> None:
    """Mean bits read of one activation row: ``2 / in_features`` times the sum of its channels' levels."""
    thread, row = isa.thread_index(), isa.block_index() - g.matvec_blocks
    x = isa.global_address(refs.x)
    thresholds = load_thresholds(isa, g, refs, row)
    at_once = g.threads * COUNT_UNROLL

    def body(i: Value, carry: list[Value]) -> list[Value]:
        (count,) = carry
        channels = [i * at_once + (thread + u * g.threads) for u in range(COUNT_UNROLL)]
        valid = [channel < g.in_features for channel in channels]
        elements = [
            row * g.in_features + isa.select(ok, channel, isa.constant(0))
            for ok, channel in zip(valid, channels, strict=True)
        ]
        numbers = [load_activation(isa, g, x + isa.widen(element * g.x_bytes)) for element in elements]
        for ok, number in zip(valid, numbers, strict=True):
            magnitude = isa.absolute(number)
            for t in thresholds:
                reads = ~(magnitude < t) & ok
                count = count + isa.select(reads, isa.constant(1), isa.constant(0))
        return [count]

    (count,) = isa.loop(isa.constant(-(-g.in_features // at_once)), [isa.constant(0)], body)
    shared = isa.shared_address(refs.shared)
    of_warp = isa.reduce_add(count)
    with isa.when((thread & (LANES - 1)).equals(0)):
        isa.store_shared(shared + ((thread >> 5) << 2), [of_warp])
    isa.block_barrier()
    with isa.when(thread.equals(0)):
        total = isa.constant(0)
        for warp in range(g.config.warps):
            total = total + isa.load_shared(shared + 4 * warp)[0]
        bits = isa.int_to_float(total) * (layout.DIGIT_BITS / g.in_features)
        isa.store_global(isa.global_address(refs.bits) + isa.widen(row << 2), [bits])
