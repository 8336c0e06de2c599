"""The lane program of the product at one level with copies of boxes.

It computes what ``matmul.mosaic_gpu.program`` describes, with the same division of a tile among warps, and
these differences:

- One thread starts the copies of a unit. Other threads wait only until it has arrived.
- The CTAs of a cluster have different groups of the same tiles, and add up their sums. So the kernel stores
  y, not partial sums.
- Scales come from global memory to registers, a unit ahead.
- With ``Boxes.rounded`` the scales multiply the operands A. Then all units of a tile add to one set of sums,
  which leaves registers for 128 activation rows.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.boxes.combining import Combiner
from pallas_kernels.matmul.mosaic_gpu.boxes.geometry import X_ROW_CHANNELS, BoxesGeometry
from pallas_kernels.matmul.mosaic_gpu.boxes.lane_context import BoxesContext, BoxesRefs, boxes_context
from pallas_kernels.matmul.mosaic_gpu.boxes.streaming import BoxCopies
from pallas_kernels.matmul.mosaic_gpu.geometry import ACTIVATION_BYTES, BLOCK_CHANNELS, BLOCKS, PRODUCTS
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    chunk,
    first_chunk,
    in_row,
    output_in_chunk,
    tile_pieces,
)
from pallas_kernels.matmul.mosaic_gpu.operands import POSITIONS, Moves, Scales, load_operands


def boxes_program(isa: Instructions, g: BoxesGeometry, refs: BoxesRefs, unit: float) -> None:
    """Runs the whole program of one lane; ``unit`` is that of the sums."""
    context = boxes_context(isa, g, refs)
    copies = BoxCopies(isa, g, refs, context)
    copies.start()
    multiplier = Multiplier(isa, g, refs, context, copies)
    combiner = Combiner(isa, g, refs, context, unit)
    zero = isa.constant(0)
    scales = multiplier.load_scales(zero, zero)
    copies.wait(zero)
    operands = multiplier.operands(zero, 0, multiplier.parts(scales))

    def tile(i: Value, carry: list[Value]) -> list[Value]:
        def group(j: Value, carry: list[Value]) -> list[Value]:
            return multiplier.multiply(i, j, carry)

        totals = [isa.constant(0.0, "f32")] * (4 * POSITIONS * g.octets)
        carry = isa.loop(context.groups, [*totals, *carry], group)
        combiner.combine(context.first_tile + i * g.clusters, carry[: len(totals)])
        return carry[len(totals) :]

    isa.loop(context.tiles, [*scales, *operands], tile)


class Multiplier:
    """Multiplies units, and prepares the first operands of the next one meanwhile."""

    def __init__(
        self, isa: Instructions, g: BoxesGeometry, refs: BoxesRefs, context: BoxesContext, copies: BoxCopies
    ):
        self.isa, self.g, self.refs, self.context, self.copies = isa, g, refs, context, copies
        self.planes = in_row(context.lane, context.piece)
        self.moves = Moves.of(context.parity)

    def multiply(self, i: Value, j: Value, carry: list[Value]) -> list[Value]:
        """Adds the products of the unit of the CTA's group ``j`` in its tile ``i`` to the totals.

        Args:
          i, j: Indices of the unit.
          carry: Totals ``[position][octet][4]``, words of scales, and operands A of the first block, flat.

        Returns:
          The same for the next unit.
        """
        isa, g = self.isa, self.g
        count = 4 * POSITIONS * g.octets
        totals, scales, a = carry[:count], carry[count:][:POSITIONS], carry[count + POSITIONS :]
        unit = i * self.context.groups + j
        x = self.copies.slot(unit) + g.x_base
        matrices = [totals[n : n + 4 * g.octets] for n in range(0, count, 4 * g.octets)]
        sums: list[list[Value]] | None = matrices if g.boxes.rounded else None
        parts, next_scales = self.parts(scales), list[Value]()
        for block in range(BLOCKS):

            def prepare(block: int = block) -> list[Value]:
                if block == 0:
                    next_scales.extend(self.load_scales(*self.following(i, j)))
                if block + 1 < BLOCKS:
                    operands = self.operands(unit, block + 1, parts)
                else:
                    operands = self.operands(unit + 1, 0, self.parts(next_scales))
                # Branches come last: behind one, ptxas waits for the product before it goes on.
                if block == 0:
                    self.copies.advance(unit)
                if block == BLOCKS - 2:
                    self.copies.wait(unit + 1)
                return operands

            half, channel = divmod(block * BLOCK_CHANNELS, X_ROW_CHANNELS)
            address = x + (half * g.x_half_bytes + channel * ACTIVATION_BYTES)
            registers = [a[4 * n :][:4] for n in range(PRODUCTS * POSITIONS)]
            products = [registers[POSITIONS * n :][:POSITIONS] for n in range(PRODUCTS)]
            sums, a = isa.warpgroup_multiply_add_bfloat16(
                g.rows_per_cta, sums, products, address, None, prepare
            )
        numbers = [number for position in sums or [] for number in position]
        if not g.boxes.rounded:
            numbers = self.add_scaled(totals, numbers, scales)
        return [*numbers, *next_scales, *a]

    def operands(self, unit: Value, block: int, scales: list[list[Scales]] | None) -> list[Value]:
        """Returns the operands A of a block of a unit that has arrived, flat.

        Args:
          unit: Number of the unit.
          block: Index of the block.
          scales: Scales ``[position][row]`` that multiply the operands, or None.
        """
        planes = self.copies.slot(unit) + self.planes
        a = load_operands(self.isa, self.g, planes, self.moves, block, scales)
        return [word for product in a for position in product for word in position]

    def parts(self, words: list[Value]) -> list[list[Scales]] | None:
        """Returns the scales of words that multiply operands, or None if they multiply sums."""
        if not self.g.boxes.rounded:
            return None
        return [[Scales.of(self.isa, number) for number in self.unpack(word)] for word in words]

    def add_scaled(self, totals: list[Value], sums: list[Value], words: list[Value]) -> list[Value]:
        """Returns the totals plus the sums times the scales."""
        scales, each = [self.unpack(word) for word in words], 4 * self.g.octets
        return [
            self.isa.multiply_add(number, scales[n // each][n % 4 // 2], total)
            for n, (number, total) in enumerate(zip(sums, totals, strict=True))
        ]

    def unpack(self, word: Value) -> list[Value]:
        """Returns the scales of a word: of the first rows of A, and of the last ones."""
        return [self.isa.half_to_float(word, half) for half in ("low", "high")]

    def following(self, i: Value, j: Value) -> tuple[Value, Value]:
        """Returns the indices of the next unit, or of this one if it is the last one."""
        isa, zero = self.isa, self.isa.constant(0)
        same_tile = j + 1 < self.context.groups
        more = i + 1 < self.context.tiles
        tile = isa.select(same_tile, i, isa.select(more, i + 1, i))
        return tile, isa.select(same_tile, j + 1, isa.select(more, zero, j))

    def load_scales(self, i: Value, j: Value) -> list[Value]:
        """Loads a word with the scales of the lane's two outputs of each position."""
        isa, g, context = self.isa, self.g, self.context
        tile = context.first_tile + i * g.clusters
        pieces, piece = tile_pieces(isa, g, tile), context.piece
        if pieces is not None:
            piece = isa.select(piece < pieces, piece, isa.constant(0))
        first, chunk_outputs = chunk(isa, g, tile)
        output = (context.first_group + j) * g.stored_n + first + (piece << 4) + output_in_chunk(context)
        words = []
        for position in range(POSITIONS):
            place = output + (first_chunk(context) + position) * chunk_outputs
            words += isa.load_global(
                isa.global_address(self.refs.scales) + (isa.widen(place) << 1), ordered=True
            )
        return words
