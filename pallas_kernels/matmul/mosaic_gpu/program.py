"""The lane program of the product at one level.

For each activation row and group of input channels the matrix unit computes, in integers,

    sum_k (c[k, n] - m) q[k]    with    c = sum_{f < level} d_f 4**(3 - f)    and    m = 1.5 sum 4**(3 - f)

where ``q`` are 16-bit codes of x (see ``coding``). Times the scales of the weight, and the unit of the codes,
that is the product with the weight (see ``NestedWeight``).

From planes to operands
=======================
The code ``c`` is a byte, so the digits of all planes need only be moved to its bits. The four digits of a
byte of a plane belong to four outputs, called *positions*. A transposing load and byte permutations give a
lane, for each plane, words with one byte of four channels. Shifts and selections by bits then turn the words
of all planes into a word with four codes for each position: at level 4 they are 16 instructions for 16 codes.
There is no conversion, no multiplication with a scale and no rounding.

Division of work
================
    CTA        consecutive units (see ``Geometry``), up to 64 activation rows
    warp       one piece of the tile, which is 64 outputs, and up to 32 activation rows
    lane       ``4 row + column`` has two bytes of the piece, which are 8 outputs, and in C the activation
               rows ``column`` and ``4 + column`` of each octet
    step       64 or 128 channels in the planes of the level, and their codes, which fill a slot of the ring

A matrix instruction multiplies A [16 outputs, 32 channels] with B [32 channels, 4 activation rows of high and
low bytes]. At the end of a group a lane adds the high and the low sum, times scale and unit, to its totals.
At the end of the CTA's units in a tile, it stores the totals as a partial sum.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import LaneContext, Refs, first_octet, in_row, lane_context
from pallas_kernels.matmul.mosaic_gpu.multiplication import (
    OPERAND_BYTES,
    add_group,
    load_scales,
    multiply_step,
    starts,
)
from pallas_kernels.matmul.mosaic_gpu.own_codes import Coder
from pallas_kernels.matmul.mosaic_gpu.storing import store
from pallas_kernels.matmul.mosaic_gpu.streaming import Copies


def level_matmul_program(isa: Instructions, g: Geometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    context = lane_context(isa, g, refs)
    coder = Coder.create(isa, g, refs, context) if g.codes_activations else None
    words = coder.load(isa.constant(0)) if coder else []
    copies = Copies(isa, g, refs, context, isa.thread_index())
    copies.fill_ring()
    if coder:
        coder.store(isa.constant(0), words)
    first_tile = context.first_unit // g.groups
    last_tile = (context.first_unit + context.units - 1) // g.groups

    def part_of_tile(i: Value, carry: list[Value]) -> list[Value]:
        """Multiplies the CTA's units in one tile, after the ``done`` units before."""
        (done,) = carry
        tile = first_tile + i
        rest, rest_of_tile = context.units - done, (tile + 1) * g.groups - (context.first_unit + done)
        ends_tile = rest >= rest_of_tile
        units = isa.select(ends_tile, rest_of_tile, rest)
        zeros = [isa.constant(0.0, "f32")] * (16 * g.octets)
        totals = isa.loop(
            units, zeros, lambda j, totals: multiply_group(isa, g, context, copies, coder, done + j, totals)
        )
        store(isa, g, refs, context, tile, ends_tile, totals)
        return [done + units]

    isa.loop(last_tile - first_tile + 1, [isa.constant(0)], part_of_tile)
    isa.wait_copies(0)


def multiply_group(
    isa: Instructions,
    g: Geometry,
    context: LaneContext,
    copies: Copies,
    coder: Coder | None,
    done: Value,
    totals: list[Value],
) -> list[Value]:
    """Returns the totals plus the sums of the CTA's unit number ``done``."""
    planes = context.shared + in_row(g, context.lane, context.piece)
    operand = isa.constant(0) + first_octet(g, context) * OPERAND_BYTES
    if not g.warpgroups:
        operand = operand + (context.lane << 4)
    group_slot = context.shared + done % g.group_slots * g.group_bytes + g.groups_base
    records = group_slot + g.scales_bytes
    if coder:
        coded = context.shared + coder.base(done)
        records = coded + g.group_code_bytes
    next_words: list[Value] = []
    sums: list[list[Value]] = []
    for step_of_group in range(g.group_steps):
        step = done * g.group_steps + step_of_group
        isa.wait_copies(g.slots - 2)
        if g.warpgroups:
            isa.publish_operands()
        isa.block_barrier()  # Now this step is visible, and the slot of the previous step is free.
        copies.copy(step + (g.slots - 1))
        if step_of_group == 0:
            next_words = coder.load(done + 1) if coder else []
            sums = starts(isa, g, context, records) * 4  # of each position
        slot = step % g.slots * g.slot_bytes
        if coder:
            codes = coded + operand + step_of_group * (g.step_matrices * g.matrix_code_bytes)
        else:
            codes = context.shared + slot + operand + g.level * g.plane_step_bytes
        sums = multiply_step(isa, g, planes + slot, codes, sums)
    if coder:
        coder.store(done + 1, next_words)
    scales = load_scales(isa, g, context, group_slot)
    return add_group(isa, g, context, scales, records, totals, sums)
