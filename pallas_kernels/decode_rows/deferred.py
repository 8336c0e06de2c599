"""SwiGLU in the prologue of the product that reads its result (see ``prologues``)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.decode_rows.program import Shape, silu_times
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.prologues.deferred import rounded


@dataclasses.dataclass(frozen=True)
class SwigluSource:
    """A ``prologues.deferred.Source``; its array is ``program.SwigluRefs.partials``.

    Attributes:
      shape: Sizes of the launch that it replaces, with one row and one term.
    """

    shape: Shape

    @property
    def features(self) -> int:
        """Number of features of the row."""
        return self.shape.rows.features

    def load(
        self, isa: Instructions, refs: Sequence[Any], channels: list[Value], span: int
    ) -> list[list[list[Value]]]:
        """Loads the partial sums of gate and up of each channel, ``[channel][half][partial]``."""
        (partials,) = refs
        base = isa.global_address(partials)

        def load_half(channel: Value, half: int) -> list[Value]:
            address = base + isa.widen(channel << 2) + 4 * half * self.features
            offsets = range(0, 4 * self.shape.num_partials * self.shape.stride, 4 * self.shape.stride)
            return [isa.load_global(address + i, kind="f32", ordered=True)[0] for i in offsets]

        return [[load_half(channel, half) for half in range(2)] for channel in channels]

    def combine(self, isa: Instructions, loaded: list[list[list[Value]]]) -> list[Value]:
        """Returns ``silu(gate) * up`` of each channel. Adds partial sums in the order of ``Shape.sum``."""
        gate, up = ([_added(halves[i]) for halves in loaded] for i in range(2))
        return [rounded(isa, number) for number in silu_times(isa, gate, up)]


def _added(numbers: list[Value]) -> Value:
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total
