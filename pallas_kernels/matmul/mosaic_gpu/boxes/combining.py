"""Adds up the sums of a tile over the CTAs of a cluster, and stores y.

The sums of a lane for an octet of activation rows and a position are an *item*. Item ``i`` of those that are
exchanged at once belongs to the CTA of rank ``i % cluster``, which gets it from all CTAs and adds up in the
order of ranks.
"""

from collections.abc import Sequence

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.boxes.geometry import ITEM_BYTES, BoxesGeometry
from pallas_kernels.matmul.mosaic_gpu.boxes.lane_context import BoxesContext, BoxesRefs
from pallas_kernels.matmul.mosaic_gpu.geometry import OCTET
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    chunk,
    first_chunk,
    output_in_chunk,
    tile_pieces,
)
from pallas_kernels.matmul.mosaic_gpu.operands import POSITIONS


class Combiner:
    """Combines the sums of tiles.

    Attributes:
      unit: The unit of the sums, a constant factor of y besides the gain of the level.
    """

    def __init__(
        self, isa: Instructions, g: BoxesGeometry, refs: BoxesRefs, context: BoxesContext, unit: float
    ):
        self.isa, self.g, self.refs, self.context = isa, g, refs, context
        gain = isa.global_address(refs.gains) + 4 * (g.level - 1)
        self.factor = isa.load_global(gain, kind="f32")[0] * unit

    def combine(self, tile: Value, totals: Sequence[Value]) -> None:
        """Stores y of a tile from the totals ``[position][octet][4]`` of all CTAs of the cluster."""
        g = self.g
        items = [
            (octet, position, totals[4 * (position * g.octets + octet) :][:4])
            for octet in range(g.octets)
            for position in range(POSITIONS)
        ]
        if g.cluster == 1:
            for octet, position, sums in items:
                self._store(tile, self.isa.constant(octet), self.isa.constant(position), sums)
            return
        at_once = g.exchanged_octets * POSITIONS
        for first in range(0, len(items), at_once):
            self._exchange([sums for _, _, sums in items[first : first + at_once]])
            self._add_up(tile, first, min(at_once, len(items) - first))

    def _places(self, items: int) -> int:
        """Returns how many items a CTA gets, at most."""
        return -(-items // self.g.cluster)

    def _address(self, sender: Value | int, place: int, items: int) -> Value:
        """Returns the lane's address of an item from a CTA."""
        offset = (self.isa.constant(sender) if isinstance(sender, int) else sender) * self._places(
            items
        ) + place
        return self.context.shared + offset * ITEM_BYTES + (self.context.thread << 4)

    def _exchange(self, items: list[Sequence[Value]]) -> None:
        """Sends items to the CTAs that own them."""
        isa, g = self.isa, self.g
        isa.cluster_barrier()  # They have read what they got before, and have started.
        for i, sums in enumerate(items):
            address = self._address(self.context.rank, i // g.cluster, len(items))
            isa.store_cluster(address, i % g.cluster, [isa.float_to_bits(number) for number in sums])
        isa.cluster_barrier()

    def _add_up(self, tile: Value, first: int, items: int) -> None:
        """Adds up the CTA's items among those from ``first`` on."""
        isa, g = self.isa, self.g
        for place in range(self._places(items)):
            item = self.context.rank + place * g.cluster
            with isa.when(item < items):
                sums = isa.load_shared(self._address(0, place, items), 4, "f32")
                for sender in range(1, g.cluster):
                    others = isa.load_shared(self._address(sender, place, items), 4, "f32")
                    sums = [a + b for a, b in zip(sums, others, strict=True)]
                item = item + first
                self._store(tile, item // POSITIONS, item % POSITIONS, sums)

    def _store(self, tile: Value, octet: Value, position: Value, sums: Sequence[Value]) -> None:
        """Stores y of an item, two neighbouring outputs at once."""
        isa, g, context = self.isa, self.g, self.context
        first, chunk_outputs = chunk(isa, g, tile)
        output = first + (context.piece << 4) + output_in_chunk(context)
        output = output + (first_chunk(context) + position) * chunk_outputs
        row = context.batch * g.rows_per_cta + octet * OCTET + ((context.lane & 3) << 1)
        pieces = tile_pieces(isa, g, tile)
        for column in range(2):
            exists = row + column < g.rows
            with isa.when(exists if pieces is None else exists & (context.piece < pieces)):
                offset = isa.widen((row + column) * g.stored_n + output) << 2
                pair = [sums[column] * self.factor, sums[column + 2] * self.factor]
                isa.store_global(isa.global_address(self.refs.y) + offset, pair)
