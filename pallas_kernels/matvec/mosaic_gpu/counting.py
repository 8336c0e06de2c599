"""The program of the CTAs that compute the statistics of a launch, one CTA for each activation row."""

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.listing import load_activation, load_thresholds

LOADS_IN_FLIGHT = 32
"""Number of activations that a lane loads before it uses the first. While other CTAs multiply, a load takes
one or two microseconds."""


def count_levels(isa: Instructions, g: Geometry, refs: Refs, row: Value | None = None) -> None:
    """Writes the mean bits read, ``2 / in_features`` times the sum of the levels, and the largest ``|x|``.

    The default of ``row`` gives each of the last CTAs one activation row.
    """
    thread = isa.thread_index()
    if row is None:
        row = isa.block_index() - g.matvec_blocks
    thresholds, factor = load_thresholds(isa, g, refs, row)
    first = isa.global_address(refs.x) + isa.widen((g.x_row(row) * g.in_features + thread) * g.x_bytes)
    stride = g.threads * g.x_bytes
    zero, one = isa.constant(0), isa.constant(1)

    def add(stats: list[Value], x: Value, counts: Value | None = None) -> list[Value]:
        """Adds the level of one activation if ``counts`` holds, and updates the largest magnitude.

        Magnitudes are compared by their bits, which order NaN above all numbers.
        """
        level_sum, largest = stats
        magnitude = isa.absolute(x)
        level = zero
        for t in thresholds:  # not (|x| < t), as in `listing.grade`
            level = level + isa.select(~(magnitude < t), one, zero)
        if counts is not None:
            level = isa.select(counts, level, zero)
        return [level_sum + level, isa.maximum(largest, isa.float_to_bits(magnitude))]

    def add_loads(stats: list[Value], address: Value, loads: int) -> list[Value]:
        """Adds ``loads`` activations, all loaded before the first is used."""
        for x in [load_activation(isa, g, address + i * stride) for i in range(loads)]:
            stats = add(stats, x)
        return stats

    # Rounds in which every thread has an activation need no bounds check, and have constant strides.
    rounds, rest = divmod(g.in_features, g.threads)
    loops, last_loads = divmod(rounds, LOADS_IN_FLIGHT)
    loop_bytes = LOADS_IN_FLIGHT * stride
    stats = [zero, zero]
    if loops:
        stats = isa.loop(
            isa.constant(loops),
            stats,
            lambda i, stats: add_loads(stats, first + isa.widen(i * loop_bytes), LOADS_IN_FLIGHT),
        )
    stats = add_loads(stats, first + loops * loop_bytes, last_loads)
    if rest:  # Threads without an activation load the first one of the row and do not count its level.
        exists = thread < rest
        last, start = first + rounds * stride, first - isa.widen(thread * g.x_bytes)
        stats = add(stats, load_activation(isa, g, isa.select(exists, last, start)), exists)
    store_stats(isa, g, refs, row, stats, factor)


def store_stats(
    isa: Instructions, g: Geometry, refs: Refs, row: Value, stats: list[Value], factor: Value | None
) -> None:
    """Reduces the statistics over the CTA and writes the row's mean bits and largest ``|x|``."""
    thread, shared = isa.thread_index(), isa.shared_address(refs.shared)
    warp_stats = [isa.reduce_add(stats[0]), isa.reduce_max(stats[1])]
    with isa.when((thread & (LANES - 1)).equals(0)):
        isa.store_shared(shared + ((thread >> 5) << 3), warp_stats)
    isa.block_barrier()
    with isa.when(thread.equals(0)):
        level_sum, largest = isa.constant(0), isa.constant(0)
        for warp in range(g.warps):
            warp_sum, warp_largest = isa.load_shared(shared + 8 * warp, 2)
            level_sum, largest = level_sum + warp_sum, isa.maximum(largest, warp_largest)
        bits = isa.int_to_float(level_sum) * (layout.DIGIT_BITS / g.in_features)
        max_abs = isa.bits_to_float(largest)
        if factor is not None:
            max_abs = max_abs * factor
        isa.store_global(isa.global_address(refs.stats) + isa.widen(row << 3), [bits, max_abs])
