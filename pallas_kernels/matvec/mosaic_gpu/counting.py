"""The CTAs that count levels, each those of one activation row: what the launch says of its input."""

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry
from pallas_kernels.matvec.mosaic_gpu.listing import load_activation, load_thresholds
from pallas_kernels.matvec.mosaic_gpu.place import Refs

AT_ONCE = 32
"""Activations that a lane loads before it looks at the first: beside the CTAs that multiply, a load takes
a microsecond or two."""


def count_levels(isa: Instructions, g: Geometry, refs: Refs) -> None:
    """Mean bits read, ``2 / in_features`` times the sum of the channels' levels, and the largest ``|x|``."""
    thread, row = isa.thread_index(), isa.block_index() - g.matvec_blocks
    thresholds, factor = load_thresholds(isa, g, refs, row)
    first = isa.global_address(refs.x) + isa.widen((row * g.in_features + thread) * g.x_bytes)
    stride = g.threads * g.x_bytes
    zero, one = isa.constant(0), isa.constant(1)

    def look(seen: list[Value], number: Value, counts: Value | None = None) -> list[Value]:
        """Count and largest magnitude (its bits, whose order NaN ends) with one more activation."""
        count, largest = seen
        magnitude = isa.absolute(number)
        level = zero
        for t in thresholds:  # not (|x| < t), as in `listing.grade`
            level = level + isa.select(~(magnitude < t), one, zero)
        if counts is not None:
            level = isa.select(counts, level, zero)
        return [count + level, isa.maximum(largest, isa.float_to_bits(magnitude))]

    def look_at(seen: list[Value], address: Value, loads: int) -> list[Value]:
        for number in [load_activation(isa, g, address + u * stride) for u in range(loads)]:
            seen = look(seen, number)
        return seen

    # Whole rounds of all threads need no check of bounds, and their addresses are constants apart.
    rounds, rest = divmod(g.in_features, g.threads)
    loops, left = divmod(rounds, AT_ONCE)
    at_once = AT_ONCE * stride
    seen = [zero, zero]
    if loops:
        seen = isa.loop(
            isa.constant(loops), seen, lambda i, seen: look_at(seen, first + isa.widen(i * at_once), AT_ONCE)
        )
    seen = look_at(seen, first + loops * at_once, left)
    if rest:  # Lanes without one look at the row's first again, and do not count it.
        inside = thread < rest
        last, start = first + rounds * stride, first - isa.widen(thread * g.x_bytes)
        seen = look(seen, load_activation(isa, g, isa.select(inside, last, start)), inside)
    store_reading(isa, g, refs, row, seen, factor)


def store_reading(
    isa: Instructions, g: Geometry, refs: Refs, row: Value, seen: list[Value], factor: Value | None
) -> None:
    """Puts together what the lanes have seen and writes the row's mean bits and largest |x|."""
    thread, shared = isa.thread_index(), isa.shared_address(refs.shared)
    of_warp = [isa.reduce_add(seen[0]), isa.reduce_max(seen[1])]
    with isa.when((thread & (LANES - 1)).equals(0)):
        isa.store_shared(shared + ((thread >> 5) << 3), of_warp)
    isa.block_barrier()
    with isa.when(thread.equals(0)):
        total, top = isa.constant(0), isa.constant(0)
        for warp in range(g.config.warps):
            count, largest = isa.load_shared(shared + 8 * warp, 2)
            total, top = total + count, isa.maximum(top, largest)
        bits = isa.int_to_float(total) * (layout.DIGIT_BITS / g.in_features)
        largest = isa.bits_to_float(top)
        if factor is not None:
            largest = largest * factor
        isa.store_global(isa.global_address(refs.reading) + isa.widen(row << 3), [bits, largest])
