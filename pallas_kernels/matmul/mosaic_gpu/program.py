"""The lane program of the product at one level, for GPUs of compute capability 9.0.

For each group of input channels the matrix unit computes, in float32,

    sum_k a[k, n] x[k]    with    a = 2 c + 1 - 4**level

where ``c`` is the code of a weight, the number that its first ``level`` digits are. The numbers a are
bfloat16 (see ``operands``), so nothing is rounded but the float32 sums. Times the scales of the weight, these
sums are twice the product with the weight at this level, in units of the last digit that is read.

If ``Geometry.rounded``, the scales multiply a instead of the sums, and the products are rounded to bfloat16.
Then all groups of a tile add to the same sums, which leaves registers for 128 activation rows.

Division of work
================
    CTA        consecutive units (see ``Geometry``), up to 64 activation rows, or 128 if rounded
    warpgroup  two of the four positions of all bytes of the tile
    warp       these positions of one piece, 32 outputs
    lane       ``4 row + column`` has two bytes of the piece, which are 4 outputs, and in C the activation
               rows ``2 column`` and ``2 column + 1`` of each octet
    block      32 channels, whose operands A are prepared while the matrix unit has those of the block before

At the end of a unit a lane adds its sums, times the scales, to its totals. At the end of the CTA's units in a
tile, it stores the totals as a partial sum.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import (
    ACTIVATION_BYTES,
    BLOCK_CHANNELS,
    BLOCKS,
    PRODUCTS,
    TEAM,
    X_ROW_CHANNELS,
    Geometry,
)
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    LaneContext,
    Refs,
    chunk,
    first_chunk,
    in_row,
    lane_context,
    output_in_chunk,
    tile_pieces,
)
from pallas_kernels.matmul.mosaic_gpu.operands import POSITIONS, Moves, Scales, load_operands
from pallas_kernels.matmul.mosaic_gpu.storing import store
from pallas_kernels.matmul.mosaic_gpu.streaming import Copies


def level_matmul_program(isa: Instructions, g: Geometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    context = lane_context(isa, g, refs)
    copies = Copies(isa, g, refs, context)
    copies.start()
    multiplier = Multiplier(isa, g, refs, context, copies)
    operands = multiplier.start()
    first_tile = context.first_unit // g.groups
    last_tile = (context.first_unit + context.units - 1) // g.groups

    def part_of_tile(i: Value, carry: list[Value]) -> list[Value]:
        """Multiplies the CTA's units in one tile, after the ``done`` units before."""
        done, *operands = carry
        tile = first_tile + i
        rest, rest_of_tile = context.units - done, (tile + 1) * g.groups - (context.first_unit + done)
        ends_tile = rest >= rest_of_tile
        units = isa.select(ends_tile, rest_of_tile, rest)
        totals = [isa.constant(0.0, "f32")] * (4 * POSITIONS * g.octets)

        def unit(j: Value, carry: list[Value]) -> list[Value]:
            return multiplier.multiply(done + j, carry)

        out = isa.loop(units, [*totals, *operands], unit)
        store(isa, g, refs, context, tile, ends_tile, out[: len(totals)])
        return [done + units, *out[len(totals) :]]

    isa.loop(last_tile - first_tile + 1, [isa.constant(0), *operands], part_of_tile)


class Multiplier:
    """Multiplies units, and prepares the first operands of the next one meanwhile."""

    def __init__(self, isa: Instructions, g: Geometry, refs: Refs, context: LaneContext, copies: Copies):
        self.isa, self.g, self.refs, self.context, self.copies = isa, g, refs, context, copies
        self.planes = in_row(context.lane, context.piece)
        self.moves = Moves.of(context.parity)

    def start(self) -> list[Value]:
        """Waits for the first unit. Returns its words of scales, and operands A of its first block, flat."""
        unit = self.isa.constant(0)
        scales = self.load_scales(unit)
        self.copies.wait(unit)
        return [*scales, *self.operands(unit, 0, self.parts(scales))]

    def multiply(self, unit: Value, carry: list[Value]) -> list[Value]:
        """Adds the products of a unit to the totals.

        Args:
          unit: Index of the unit among those of the CTA.
          carry: Totals ``[position][octet][4]``, words of scales, and operands A of the first block, flat.

        Returns:
          The same for the next unit.
        """
        isa, g = self.isa, self.g
        count = 4 * POSITIONS * g.octets
        totals, scales, a = carry[:count], carry[count:][:POSITIONS], carry[count + POSITIONS :]
        x = self.copies.slot(unit) + g.x_base
        matrices = [totals[n : n + 4 * g.octets] for n in range(0, count, 4 * g.octets)]
        sums: list[list[Value]] | None = matrices if g.rounded else None
        parts, next_scales = self.parts(scales), list[Value]()
        for block in range(BLOCKS):

            def prepare(block: int = block) -> list[Value]:
                if block == 0:
                    next_scales.extend(self.load_scales(unit + 1))
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
            sums, a = isa.warpgroup_multiply_add_bfloat16(g.rows_per_cta, sums, products, address, prepare)
        numbers = [number for position in sums or [] for number in position]
        if not g.rounded:
            numbers = self.add_scaled(totals, numbers, scales)
        return [*numbers, *next_scales, *a]

    def operands(self, unit: Value, block: int, scales: list[list[Scales]] | None) -> list[Value]:
        """Returns the operands A of a block of a unit that has arrived, flat.

        Args:
          unit: Index of the unit among those of the CTA.
          block: Index of the block.
          scales: Scales ``[position][row]`` that multiply the operands, or None.
        """
        planes = self.copies.slot(unit) + self.planes
        a = load_operands(self.isa, self.g, planes, self.moves, block, scales)
        return [word for product in a for position in product for word in position]

    def load_scales(self, unit: Value) -> list[Value]:
        """Loads a word with the scales of the lane's two outputs of each position.

        Behind the CTA's last unit, they are those of the last one. A tile that does not exist has those of
        the one before.
        """
        isa, g, context = self.isa, self.g, self.context
        number = context.first_unit + isa.select(unit < context.units, unit, context.units - 1)
        stored_tile, group = number // g.groups, number % g.groups
        tile, piece = context.tile(stored_tile), context.piece
        pieces = tile_pieces(isa, g, tile)
        if pieces is not None:
            exists = isa.constant(0) < pieces
            piece = isa.select(exists & (piece < pieces), piece, isa.constant(0))
            tile = isa.select(exists, tile, stored_tile * TEAM)
        first, chunk_outputs = chunk(isa, g, tile)
        output = group * g.stored_n + first + (piece << 4) + output_in_chunk(context)
        words = []
        for position in range(POSITIONS):
            place = output + (first_chunk(context) + position) * chunk_outputs
            address = isa.global_address(self.refs.scales) + (isa.widen(place) << 1)
            words += isa.load_global(address, ordered=True)
        return words

    def parts(self, words: list[Value]) -> list[list[Scales]] | None:
        """Returns the scales of words that multiply operands, or None if they multiply sums."""
        if not self.g.rounded:
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
