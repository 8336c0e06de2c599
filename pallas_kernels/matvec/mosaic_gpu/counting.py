"""The CTAs that count levels."""

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry
from pallas_kernels.matvec.mosaic_gpu.listing import load_activation, load_thresholds
from pallas_kernels.matvec.mosaic_gpu.place import Refs

AT_ONCE = 32
"""Activations that a lane loads before it looks at the first: beside the CTAs that multiply, a load takes
a microsecond or two."""


def count_levels(isa: Instructions, g: Geometry, refs: Refs) -> None:
    """Mean bits read of one activation row: ``2 / in_features`` times the sum of its channels' levels."""
    thread, row = isa.thread_index(), isa.block_index() - g.matvec_blocks
    thresholds, _ = load_thresholds(isa, g, refs, row)
    first = isa.global_address(refs.x) + isa.widen((row * g.in_features + thread) * g.x_bytes)
    stride = g.threads * g.x_bytes

    def add_levels(count: Value, address: Value, loads: int) -> Value:
        numbers = [load_activation(isa, g, address + u * stride) for u in range(loads)]
        for number in numbers:
            count = count + level(isa, number, thresholds)
        return count

    # Whole rounds of all threads need no check of bounds, and their addresses are constants apart.
    rounds, rest = divmod(g.in_features, g.threads)
    loops, left = divmod(rounds, AT_ONCE)
    at_once = AT_ONCE * stride
    count = isa.constant(0)
    if loops:
        (count,) = isa.loop(
            isa.constant(loops),
            [count],
            lambda i, carry: [add_levels(carry[0], first + isa.widen(i * at_once), AT_ONCE)],
        )
    count = add_levels(count, first + loops * at_once, left)
    if rest:
        inside = thread < rest
        offset = isa.select(inside, isa.constant(rounds * stride), isa.constant(0))
        address = isa.select(inside, first, isa.global_address(refs.x))
        last = level(isa, load_activation(isa, g, address + isa.widen(offset)), thresholds)
        count = count + isa.select(inside, last, isa.constant(0))
    store_mean(isa, g, refs, row, count)


def level(isa: Instructions, number: Value, thresholds: list[Value]) -> Value:
    """Level of one activation, as in ``listing.grade``."""
    magnitude, one, zero = isa.absolute(number), isa.constant(1), isa.constant(0)
    total = zero
    for t in thresholds:
        total = total + isa.select(~(magnitude < t), one, zero)
    return total


def store_mean(isa: Instructions, g: Geometry, refs: Refs, row: Value, count: Value) -> None:
    """Sums the lanes' counts and writes the row's mean bits."""
    thread, shared = isa.thread_index(), isa.shared_address(refs.shared)
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
