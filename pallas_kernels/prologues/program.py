"""The lane program of a graded product whose prologue computes its activation row.

The program is ``matvec.mosaic_gpu.program``, whose first phase, ``fetch``, loads each activation from memory.
Here ``fetch`` loads the results of earlier launches instead, and computes the activations from them. All CTAs
for the same input channels repeat that. Their loads hit the L2, and they save the launch that would compute
the row once, and the time in which no weight is read between that launch and this one.

One CTA would take longer to compute the whole row for the statistics than the others take to multiply.
Therefore ``COUNTING_CTAS`` CTAs count the levels of a part each, and ``grading.GradingParts`` adds them up.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matvec.mosaic_gpu.counting import store_stats
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry
from pallas_kernels.matvec.mosaic_gpu.lane_context import LaneContext, Refs
from pallas_kernels.matvec.mosaic_gpu.listing import Operands, load_by_plane
from pallas_kernels.matvec.mosaic_gpu.program import matvec
from pallas_kernels.prologues.deferred import Source

COUNTING_CTAS = 16
"""Number of CTAs that compute statistics. It is the same for all products, so that XLA adds up the parts of
all products of a step in one kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrologueGeometry(Geometry):
    """Sizes of a launch with one activation row.

    Attributes:
      source: How the prologue computes the row.
    """

    source: Source

    @property
    def blocks(self) -> int:
        """Number of CTAs: those that multiply, and those that count levels."""
        return self.matvec_blocks + COUNTING_CTAS

    @property
    def part_channels(self) -> int:
        """Number of input channels whose levels a CTA counts. The last parts may have fewer."""
        return -(-self.in_features // COUNTING_CTAS)


def prologue_program(
    isa: Instructions, geometry: PrologueGeometry, refs: Refs, sources: Sequence[Any]
) -> None:
    """Runs the whole program of one lane.

    Args:
      isa: The instructions.
      geometry: Sizes of the launch.
      refs: Arrays of the product, without ``x``. ``stats`` is float32 ``[1, COUNTING_CTAS, 2]``: the sum of
        the levels and the largest ``|x|`` of each part.
      sources: Arrays of ``Deferred``.
    """
    multiplies = isa.block_index() < geometry.matvec_blocks

    def fetch(isa: Instructions, g: Geometry, refs: Refs, context: LaneContext) -> Operands:
        """Loads everything that grading needs. No load depends on another."""
        source, valid = geometry.source, None
        channels = [context.channel + LANES * q for q in range(g.channels_per_lane)]
        if g.has_padding:
            valid = [channel < g.in_features for channel in channels]
            channels = [isa.select(v, c, isa.constant(0)) for v, c in zip(valid, channels, strict=True)]
        span = 0 if g.has_padding else LANES * g.channels_per_lane
        # Ordered, because the compiler would delay these loads until the first results have come.
        thresholds = load_by_plane(isa, g, isa.global_address(refs.thresholds), ordered=True)
        gains = load_by_plane(isa, g, isa.global_address(refs.level_gains), ordered=True)[:-1]
        x = source.combine(isa, source.load(isa, sources, channels, span))
        if valid is not None:
            zero = isa.constant(0.0, "f32")
            x = [isa.select(v, number, zero) for v, number in zip(valid, x, strict=True)]
        return Operands(thresholds=[thresholds], x=[x], valid=valid, factors=None, gains=gains)

    with isa.when(multiplies):
        matvec(isa, geometry, refs, fetch)
    with isa.when(~multiplies):
        count_part(isa, geometry, refs, sources)


def count_part(isa: Instructions, g: PrologueGeometry, refs: Refs, sources: Sequence[Any]) -> None:
    """Writes the sum of the levels, which is exact, and the largest ``|x|`` of one part of the channels."""
    thread, part = isa.thread_index(), isa.block_index() - g.matvec_blocks
    thresholds = load_by_plane(isa, g, isa.global_address(refs.thresholds), ordered=True)
    zero, one = isa.constant(0), isa.constant(1)
    channels, counted = [], []
    for first in range(0, g.part_channels, g.threads):
        of_part = thread + first
        channel = part * g.part_channels + of_part
        exists = (of_part < g.part_channels) & (channel < g.in_features)
        channels.append(isa.select(exists, channel, zero))
        counted.append(exists)
    loaded = g.source.load(isa, sources, channels, 0)
    level_sum, largest = zero, zero
    for x, exists in zip(g.source.combine(isa, loaded), counted, strict=True):
        magnitude = isa.absolute(x)
        for t in thresholds:  # not (|x| < t), as in `listing.grade`
            level_sum = level_sum + isa.select(~(magnitude < t) & exists, one, zero)
        largest = isa.maximum(largest, isa.select(exists, isa.float_to_bits(magnitude), zero))

    def finish(level_sum: Value, largest: Value) -> list[Value]:
        return [isa.int_to_float(level_sum), isa.bits_to_float(largest)]

    store_stats(isa, g, refs, part, [level_sum, largest], finish)
