"""The lane program of the product at one level.

For each activation row and group of input channels the matrix unit computes

    sum_k (128 + c[k, n]) x[k]      with     c = sum_{f < level} d_f 4**(2 - f)

from which the program subtracts ``128 + 3/2 sum_f 4**(2 - f)`` times the sum of x over the group. The rest,
times ``scales / 16``, is the product with the weight (see ``NestedWeight``) without the gain of the level.

No dense copy
=============
For levels up to 3, ``c`` is an integer below 64. The bits of the bfloat16 ``128 + c`` are ``4300 | c``. So
two masks turn a byte with a code into an operand of the matrix unit, without conversion and without rounding.
At level 4 the last digit needs a ninth significant bit. A second matrix ``128 + 32 d_3`` is multiplied with
``x / 128``, which adds ``(1 + d_3 / 4) x`` to the same sums.

Division of work
================
    CTA        one tile of outputs, ``groups_per_cta`` groups of channels, up to 64 activation rows
    warp       8 words of the tile, all or some of the four digit positions of their bytes
    lane       ``4 row + column`` has word ``row`` of the warp, and channels ``8 column .. + 7`` of 32
    step       32 channels in the planes of the level, which fill one slot of the CTA's ring in shared memory

A matrix instruction multiplies A [16 outputs, 16 channels] with B [16 channels, 8 activation rows]. In A,
rows ``r`` and ``r + 8`` are bytes ``2 q`` and ``2 q + 1`` of word ``r`` at one position: neighbouring
outputs. The unit's channels ``2 column + 8 j + e`` are the channels ``8 column + 4 s + 2 j + e`` of a step,
with ``s`` the instruction of the step. So a lane loads its 8 activations of a row with one 16-byte load.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import GROUP_STEPS, MATRIX_ROWS, SLOTS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import LaneContext, Refs, lane_context
from pallas_kernels.matmul.mosaic_gpu.multiplication import (
    accumulator,
    add_group,
    load_activations,
    load_scales,
    load_sums,
    multiply_step,
)
from pallas_kernels.matmul.mosaic_gpu.streaming import Copies


def level_matmul_program(isa: Instructions, g: Geometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    context = lane_context(isa, g, refs)
    copies = Copies.create(isa, g, refs, context)
    groups = isa.constant(g.groups_per_cta)
    if g.groups % g.groups_per_cta:
        rest = isa.constant(g.groups) - context.first_group
        groups = isa.select(rest < g.groups_per_cta, rest, groups)
    steps = groups * GROUP_STEPS
    for step in range(SLOTS - 1):  # A group has at least as many steps.
        copies.copy(isa.constant(step))
        isa.commit_copies()

    def body(i: Value, totals: list[Value]) -> list[Value]:
        group = context.first_group + i
        scales = load_scales(isa, g, refs, context, group)
        sums = load_sums(isa, g, refs, context, group)
        accumulators = [isa.constant(0.0, "f32")] * len(totals)
        for step in range(GROUP_STEPS):
            activations = load_activations(isa, g, context, i * GROUP_STEPS + step)
            isa.wait_copies(SLOTS - 2)
            isa.block_barrier()  # Now this step is visible, and the slot of the previous step is free.
            ahead = i * GROUP_STEPS + (step + SLOTS - 1)
            with isa.when(ahead < steps):
                copies.copy(ahead)
            isa.commit_copies()
            # GROUP_STEPS is a multiple of SLOTS, so the slot does not depend on the group.
            slot = context.words + step % SLOTS * g.slot_bytes
            accumulators = multiply_step(isa, g, context, accumulators, slot, activations)
        return add_group(isa, g, totals, accumulators, scales, sums)

    zeros = [isa.constant(0.0, "f32")] * (8 * g.positions * g.row_tiles)
    totals = isa.loop(groups, zeros, body)
    isa.wait_copies(0)
    store(isa, g, refs, context, totals)


def store(isa: Instructions, g: Geometry, refs: Refs, context: LaneContext, totals: list[Value]) -> None:
    """Stores the totals: pairs of neighbouring outputs of two activation rows of each row tile."""
    partials = isa.global_address(refs.partials)
    for t in range(g.row_tiles):
        for j in range(2):
            row = context.first_row + (context.column << 1) + (MATRIX_ROWS * t + j)
            storing = row < g.rows if context.exists is None else (row < g.rows) & context.exists
            with isa.when(storing):
                first = (context.split * g.rows + row) * g.stored_n
                for pair, output in enumerate(context.outputs):
                    k = accumulator(g, pair // 2, pair % 2, t) + j
                    isa.store_global(partials + (isa.widen(first + output) << 2), [totals[k], totals[k + 2]])
