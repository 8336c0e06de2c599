"""Phase copy with ``DenseRows.coded``: bits of coded activations say which plane rows some row reads."""

import dataclasses
from collections.abc import Callable, Sequence

from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.dense_rows.copying import Copies, copied_early
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import BLOCK_BYTES
from pallas_kernels.matvec.mosaic_gpu.dense_rows.lane_context import pieces_of, place_of, slot_offset
from pallas_kernels.matvec.mosaic_gpu.geometry import ROW_BYTES
from pallas_kernels.matvec.mosaic_gpu.lane_context import COPY_BYTES
from pallas_kernels.matvec.mosaic_gpu.tile import stored_piece


@dataclasses.dataclass(frozen=True)
class Source:
    """What the copies of an item need.

    Attributes:
      planes: Global address of the thread's bytes in the first chunk, for each plane.
      marks: The bits of the thread's channel (``DenseRowsGeometry.mark_bit``); none if the item does not
        exist. None if all plane rows are to be copied.
    """

    planes: list[Value]
    marks: Value | None = None


@dataclasses.dataclass(frozen=True)
class CodedCopies(Copies):
    """Copies like ``Copies``. A thread loads the bits of a section once, and computes an address a plane."""

    def of_item(self, item: Value, marks: Value | None = None, exists: Value | None = None) -> Source:
        """Returns what the copies of an item need.

        Args:
          item: Index of the item.
          marks: Its bits, or None to copy all plane rows.
          exists: Whether the item exists; None if it does.
        """
        isa, g = self.isa, self.g
        tile, section = place_of(isa, g, self.context, item)
        piece = stored_piece(isa, self.piece, pieces_of(isa, g, self.context, tile))
        offset = self.offset + section * (g.section_channels * g.stored_row_bytes)
        first = self.source + isa.widen(offset + tile * ROW_BYTES + piece * COPY_BYTES)
        if exists is not None:
            every = isa.constant(-1) if marks is None else marks
            marks = isa.select(exists, every, isa.constant(0))
        return Source([first + f * g.plane_bytes for f in range(g.planes)], marks)

    def copy_planes(self, item: Value, step: int, planes: Sequence[int], source: Source) -> None:
        """Starts copying plane rows of a step of an item into its slot.

        Args:
          item: Index of the item.
          step: Step of the section.
          planes: The planes to copy, of those of the step.
          source: What ``of_item`` returns.
        """
        g = self.g
        chunk, planes_of_step = g.steps[step]
        target = self.target + slot_offset(g, item, step)
        for f in planes:
            where = None
            if source.marks is not None:
                where = ~(source.marks & (1 << g.mark_bit(chunk, f))).equals(0)
            self.isa.copy_async(
                target + (f - planes_of_step.start) * BLOCK_BYTES,
                source.planes[f] + chunk * (LANES * g.stored_row_bytes),
                evict_first=True,
                where=where,
            )

    def start_first(self, coded: Value, meanwhile: Callable[[], None]) -> None:
        """Starts copying the first steps.

        The bits come from global memory, because a load takes half as long as a copy to shared memory. What
        ``copied_early`` names does not wait for them.

        Args:
          coded: Global address of the CTA's coded activations.
          meanwhile: Emits instructions, which run before the bits are there.
        """
        isa, g = self.isa, self.g
        first = coded + isa.widen((self.channel << 2) + g.masks_base)
        items = range(-(-g.slots // len(g.steps)))
        loads = [isa.load_global(first + i % g.sections * (4 * LANES), ordered=True)[0] for i in items]
        steps = [(*divmod(s, len(g.steps)), copied_early(g, s)) for s in range(g.slots)]
        for item, step, early in steps:
            if early:
                exists = None
                if g.groups % g.cta_groups:  # The last CTAs of a tile have groups that do not exist.
                    group = self.context.split * g.cta_groups + item // g.config.warps_per_group
                    exists = group < g.groups
                index = isa.constant(item)
                self.copy_planes(index, step, early, self.of_item(index, exists=exists))
        meanwhile()
        for item, step, early in steps:
            index = isa.constant(item)
            exists = index < self.items if item >= g.sections else None
            rest = [f for f in g.steps[step][1] if f not in early]
            self.copy_planes(index, step, rest, self.of_item(index, loads[item], exists))
            isa.commit_copies()

    def ahead(self, item: Value) -> Callable[[int], None]:
        isa, g = self.isa, self.g
        sources = {}
        for n in sorted({(step + g.slots) // len(g.steps) for step in range(len(g.steps))}):
            _, section = place_of(isa, g, self.context, item + n)
            word = section * LANES + self.channel
            (marks,) = isa.load_shared(self.context.shared + g.masks_base + (word << 2))
            sources[n] = self.of_item(item + n, marks, item + n < self.items if n else None)

        def copy(step: int) -> None:
            items, later = divmod(step + g.slots, len(g.steps))
            self.copy_planes(item + items, later, g.steps[later][1], sources[items])
            isa.commit_copies()

        return copy
