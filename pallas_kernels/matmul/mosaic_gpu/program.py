"""The lane program of the product at one level, for GPUs of compute capability 9.0.

For each group of input channels the matrix unit computes, in float32,

    sum_k a[k, n] x[k]    with    a = 2 c + 1 - 4**level

where ``c`` is the code of a weight, the number that its first ``level`` digits are. The numbers a are
bfloat16 (see ``operands``), so nothing is rounded but the float32 sums. Times the scales of the weight, these
sums are twice the product with the weight at this level, in units of the last digit that is read.

Division of work
================
    CTA        consecutive units (see ``Geometry``), up to 64 activation rows
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
from pallas_kernels.matmul.mosaic_gpu.geometry import BLOCKS, PIECES, PRODUCTS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    LaneContext,
    Refs,
    first_chunk,
    in_row,
    lane_context,
    output_in_chunk,
)
from pallas_kernels.matmul.mosaic_gpu.operands import POSITIONS, Moves, load_operands
from pallas_kernels.matmul.mosaic_gpu.storing import store
from pallas_kernels.matmul.mosaic_gpu.streaming import Copies


def level_matmul_program(isa: Instructions, g: Geometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    context = lane_context(isa, g, refs)
    copies = Copies(isa, g, refs, context, isa.thread_index())
    multiplier = Multiplier(isa, g, context, copies)
    copies.fill_ring()
    a = multiplier.enter(isa.constant(0))
    first_tile = context.first_unit // g.groups
    last_tile = (context.first_unit + context.units - 1) // g.groups

    def part_of_tile(i: Value, carry: list[Value]) -> list[Value]:
        """Multiplies the CTA's units in one tile, after the ``done`` units before."""
        done, *a = carry
        tile = first_tile + i
        rest, rest_of_tile = context.units - done, (tile + 1) * g.groups - (context.first_unit + done)
        ends_tile = rest >= rest_of_tile
        units = isa.select(ends_tile, rest_of_tile, rest)
        totals = [isa.constant(0.0, "f32")] * (4 * POSITIONS * g.octets)

        def unit(j: Value, carry: list[Value]) -> list[Value]:
            totals, a = carry[: len(carry) - len(a_words)], carry[len(carry) - len(a_words) :]
            totals, a = multiplier.multiply(done + j, totals, a)
            return [*totals, *a]

        a_words = a
        out = isa.loop(units, [*totals, *a], unit)
        store(isa, g, refs, context, tile, ends_tile, out[: len(totals)])
        return [done + units, *out[len(totals) :]]

    isa.loop(last_tile - first_tile + 1, [isa.constant(0), *a], part_of_tile)
    isa.wait_copies(0)


class Multiplier:
    """Multiplies units, and prepares the first operands of the next one meanwhile."""

    def __init__(self, isa: Instructions, g: Geometry, context: LaneContext, copies: Copies):
        self.isa, self.g, self.context, self.copies = isa, g, context, copies
        self.planes = in_row(context.lane, context.piece)
        self.moves = Moves.of(context.parity)

    def enter(self, unit: Value) -> list[Value]:
        """Waits for a unit, and returns the operands of its first block, flat."""
        self.copies.enter(unit)
        return self.operands(unit, 0)

    def operands(self, unit: Value, block: int) -> list[Value]:
        """Returns the operands A of a block of a unit that has arrived, flat."""
        planes = self.copies.slot(unit) + self.planes
        a = load_operands(self.isa, self.g, planes, self.moves, block)
        return [word for product in a for position in product for word in position]

    def multiply(self, unit: Value, totals: list[Value], a: list[Value]) -> tuple[list[Value], list[Value]]:
        """Adds the products of a unit to the totals ``[position][octet][4]``, flat.

        Args:
          unit: Index of the unit among those of the CTA.
          totals: The totals.
          a: Operands of its first block.

        Returns:
          The totals, and the operands of the first block of the next unit.
        """
        isa, g = self.isa, self.g
        x = self.copies.slot(unit) + g.x_base
        scales = self.scales(unit)
        sums: list[list[Value]] | None = None
        for block in range(BLOCKS):

            def prepare(block=block) -> list[Value]:
                return self.operands(unit, block + 1) if block + 1 < BLOCKS else self.enter(unit + 1)

            registers = [a[4 * i :][:4] for i in range(PRODUCTS * POSITIONS)]
            products = [registers[POSITIONS * i :][:POSITIONS] for i in range(PRODUCTS)]
            address = x + block * g.block_bytes
            sums, a = isa.warpgroup_multiply_add_bfloat16(
                g.rows_per_cta, sums, products, address, g.x_distance, prepare
            )
        numbers = [number for position in sums or [] for number in position]
        each = 4 * g.octets
        return [
            isa.multiply_add(number, scales[i // each][i % 4 // 2], total)
            for i, (number, total) in enumerate(zip(numbers, totals, strict=True))
        ], a

    def scales(self, unit: Value) -> list[list[Value]]:
        """Loads the scales ``[position][2]`` of the lane's outputs."""
        isa, base = self.isa, self.copies.slot(unit) + self.g.scales_base
        scales = []
        for position in range(POSITIONS):
            in_tile = (first_chunk(self.context) + position) * PIECES + self.context.piece
            output = in_tile * 16 + output_in_chunk(self.context)
            (word,) = isa.load_shared(base + (output << 1))
            scales.append([isa.half_to_float(word, half) for half in ("low", "high")])
        return scales
