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

import dataclasses
import functools
import operator
from typing import Any

from pallas_kernels import layout
from pallas_kernels.codes import DIGIT_MEAN
from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.matmul.mosaic_gpu.geometry import (
    CODE_PLANES,
    GROUP_STEPS,
    MATRIX_ROWS,
    PLANE_STEP_BYTES,
    SLOTS,
    STEP_CHANNELS,
    WORD_WARPS,
    Geometry,
)

COPY_BYTES = 16
"""Bytes of an asynchronous copy."""

ROW_BYTES = layout.TILE_WORDS * 4
"""Bytes of a row of a plane in a whole tile."""

PIECES = layout.TILE_PIECES
"""Pieces of a whole tile."""

BFLOAT16_128 = 0x43004300
"""Bits of two bfloat16 128."""

UNIT = 16
"""Value of 1 in units of the sums, which the caller divides by: a digit of plane 0 counts 16."""


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      x: bfloat16 ``[terms, padded_rows, K]``: the activations, and at level 4 the activations / 128.
      sums: float32 ``[groups, padded_rows]``: sums of x over each group.
      planes, scales: See ``NestedWeight``.
      partials: Output, float32 ``[splits, rows, N]``: partial sums of ``UNIT`` times y, without the gain of
        the level.
      shared: The shared memory.
    """

    x: Any
    sums: Any
    planes: Any
    scales: Any
    partials: Any
    shared: Any


def offset_of(level: int) -> float:
    """Returns the number that the sums have too much for each unit of x."""
    midpoint = DIGIT_MEAN * sum(4.0 ** (2 - f) for f in range(level))
    return 128 + midpoint + (1 if level > CODE_PLANES else 0)


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices and addresses of the lane."""

    row: Value
    """``lane // 4``: index of the lane's word in the warp, and of its activation row in B."""
    column: Value
    """``lane % 4``: index of the lane's 8 channels in a step, and of its pair of activation rows in C."""
    first_group: Value
    """First group of the CTA."""
    tile: Value
    first_row: Value
    """First activation row of the CTA."""
    split: Value
    first_position: Value | int
    """First digit position of the warp."""
    outputs: list[Value]
    """Index in the row of the lane's pairs of outputs, ``[position][q]`` as a flat list."""
    exists: Value | None
    """Whether the tile has the lane's piece; None if all tiles have all pieces."""
    words: Value
    """Shared-memory address of the lane's word of its first channel in plane 0, in slot 0."""
    x: Value
    """Global address of the lane's activations of the first row tile and the first group."""


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


def lane_context(isa: Instructions, g: Geometry, refs: Refs) -> LaneContext:
    """Computes the context. Over the grid the row batch varies fastest, then the tile, then the split."""
    thread, block = isa.thread_index(), isa.block_index()
    lane, warp = thread & (LANES - 1), thread >> 5
    row, column = lane >> 2, lane & 3
    batch = block % g.row_batches
    tile, split = block // g.row_batches % g.tiles, block // (g.row_batches * g.tiles)
    word = ((warp & (WORD_WARPS - 1)) << 3) + row
    part = warp >> 2
    first_position: Value | int = 0 if g.position_parts == 1 else part * g.positions
    chunk: Value | int = layout.TILE // 4
    piece, exists = word >> 2, None
    if g.last_tile_pieces < PIECES:
        whole, last = isa.constant(PIECES), isa.constant(g.last_tile_pieces)
        pieces = isa.select(tile < g.tiles - 1, whole, last)
        exists = piece < pieces
        piece, chunk = isa.select(exists, piece, isa.constant(0)), pieces * 16
    outputs = []
    for p in range(g.positions):
        position = isa.constant(p) + first_position
        chunk_index = (((word >> 1) & 1) << 1) + (position >> 1)
        for q in range(2):
            in_chunk = (piece << 4) + ((word & 1) << 3) + ((position & 1) << 1) + 4 * q
            outputs.append(tile * layout.TILE + chunk_index * chunk + in_chunk)
    first_group = split * g.groups_per_cta
    first_row = batch * g.rows_per_cta
    swizzled = (word >> 2) ^ (column << 1)
    in_step = (column << 3) * ROW_BYTES + (swizzled << 4) + ((word & 3) << 2)
    activation = (first_row + row) * g.stored_k + first_group * layout.GROUP + (column << 3)
    return LaneContext(
        row=row,
        column=column,
        first_group=first_group,
        tile=tile,
        first_row=first_row,
        split=split,
        first_position=first_position,
        outputs=outputs,
        exists=exists,
        words=isa.shared_address(refs.shared) + in_step,
        x=isa.global_address(refs.x) + isa.widen(activation << 1),
    )


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of steps into the ring, 16 bytes by each thread.

    In the ring, piece ``i`` of channel ``k`` of a step is at place ``i ^ 2 (k // 8)`` of the channel's 128
    bytes. Then the 32 lanes of a warp load their words without bank conflicts.
    """

    isa: Instructions
    g: Geometry
    source: Value
    """Global address of the tile in the first channel of the CTA, in plane 0."""
    shared: Value
    last_piece: Value | None
    """Index of the last piece of the tile; None if all tiles have all pieces."""

    @classmethod
    def create(cls, isa: Instructions, g: Geometry, refs: Refs, context: LaneContext) -> "Copies":
        first = context.first_group * layout.GROUP
        offset = isa.widen(first * g.stored_row_bytes + context.tile * ROW_BYTES)
        last_piece = None
        if g.last_tile_pieces < PIECES:
            whole, last = isa.constant(PIECES - 1), isa.constant(g.last_tile_pieces - 1)
            last_piece = isa.select(context.tile < g.tiles - 1, whole, last)
        source = isa.global_address(refs.planes) + offset
        return cls(isa, g, source, isa.shared_address(refs.shared), last_piece)

    def copy(self, step: Value) -> None:
        """Starts copying one step into its slot. A piece that the tile lacks is a copy of its piece 0."""
        isa, g = self.isa, self.g
        slot = self.shared + (step & (SLOTS - 1)) * g.slot_bytes
        copies = g.slot_bytes // COPY_BYTES
        for first in range(0, copies, g.threads):
            index = isa.thread_index() + first
            piece, channel, plane = index & (PIECES - 1), (index >> 3) & (STEP_CHANNELS - 1), index >> 8
            target = slot + plane * PLANE_STEP_BYTES + channel * ROW_BYTES
            target = target + ((piece ^ ((channel >> 3) << 1)) << 4)
            if self.last_piece is not None:
                piece = isa.select(self.last_piece < piece, isa.constant(0), piece)
            rows = (step * STEP_CHANNELS + channel) * g.stored_row_bytes
            source = self.source + isa.widen(plane * g.plane_bytes + rows + (piece << 4))
            if first + g.threads <= copies:
                isa.copy_async(target, source, evict_first=True)
            else:
                with isa.when(index < copies):
                    isa.copy_async(target, source, evict_first=True)


def load_scales(isa: Instructions, g: Geometry, refs: Refs, context: LaneContext, group: Value) -> list:
    """Loads the scales of the lane's pairs of outputs, ``[position][q]``, two in a word."""
    first = isa.global_address(refs.scales) + isa.widen((group * g.stored_n) << 1)
    return [isa.load_global(first + isa.widen(output << 1))[0] for output in context.outputs]


def load_sums(isa: Instructions, g: Geometry, refs: Refs, context: LaneContext, group: Value) -> list:
    """Loads the sums of x over the group, two activation rows of each row tile."""
    first = group * g.padded_rows + context.first_row + (context.column << 1)
    address = isa.global_address(refs.sums) + isa.widen(first << 2)
    return [isa.load_global(address + 4 * MATRIX_ROWS * t, 2, "f32") for t in range(g.row_tiles)]


def load_activations(isa: Instructions, g: Geometry, context: LaneContext, step: Value) -> list:
    """Loads the lane's activations of a step, ``[term][row tile]``, 8 channels in 4 words."""
    address = context.x + isa.widen((step * STEP_CHANNELS) << 1)
    return [
        [
            isa.load_global(address + 2 * g.stored_k * (term * g.padded_rows + MATRIX_ROWS * t), 4)
            for t in range(g.row_tiles)
        ]
        for term in range(g.terms)
    ]


def multiply_step(
    isa: Instructions,
    g: Geometry,
    context: LaneContext,
    accumulators: list[Value],
    slot: Value,
    activations: list[list[list[Value]]],
) -> list[Value]:
    """Multiplies one step and returns the new accumulators ``[position][q][row tile][4]``, a flat list."""
    out = list(accumulators)
    for s in range(2):
        # [channel of the lane: 2 j + e][plane]
        words = [
            [
                isa.load_shared(slot + (PLANE_STEP_BYTES * f + ROW_BYTES * (4 * s + k)))[0]
                for f in range(g.level)
            ]
            for k in range(4)
        ]
        if g.position_parts > 1:
            shift = isa.constant(0) + context.first_position * 2
            words = [[word >> shift for word in planes] for planes in words]
        for term in range(g.terms):
            for p in range(g.positions):
                codes = [position_codes(planes, p, term) for planes in words]
                for q in range(2):
                    # Register i + 2 j of A: byte 2 q + i of the channels 2 j and 2 j + 1.
                    a = [
                        bfloat16_pair(isa, codes[2 * j], codes[2 * j + 1], 2 * q + i)
                        for j in range(2)
                        for i in range(2)
                    ]
                    for t in range(g.row_tiles):
                        first = accumulator(g, p, q, t)
                        b = activations[term][t][2 * s : 2 * s + 2]
                        sums = isa.matrix_multiply_add_bfloat16(out[first : first + 4], a, b)
                        out[first : first + 4] = sums
    return out


def position_codes(planes: list[Value], position: int, term: int) -> Value:
    """Joins the digits at one position of the four bytes to codes of 7 bits, one in each byte.

    Term 0 has the digits of planes 0 to 2 at bits 4, 2 and 0; term 1 that of plane 3 at bit 5.
    """
    targets = {f: 2 * (2 - f) for f in range(min(len(planes), CODE_PLANES))} if term == 0 else {3: 5}
    digits = []
    for f, bit in targets.items():
        shift = bit - 2 * position
        shifted = planes[f] << shift if shift >= 0 else planes[f] >> -shift
        digits.append(shifted & (0x03030303 << bit))
    return functools.reduce(operator.or_, digits)


def bfloat16_pair(isa: Instructions, low: Value, high: Value, byte: int) -> Value:
    """Returns two bfloat16: 128 + byte ``byte`` of ``low`` and of ``high``."""
    pair = isa.permute_bytes(low, high, byte * 0x1111 + 0x4400)
    return (pair & 0x00FF00FF) | BFLOAT16_128


def accumulator(g: Geometry, position: int, q: int, row_tile: int) -> int:
    """Returns the index of the first of four accumulators."""
    return 4 * ((2 * position + q) * g.row_tiles + row_tile)


def add_group(
    isa: Instructions,
    g: Geometry,
    totals: list[Value],
    accumulators: list[Value],
    scales: list[Value],
    sums: list[list[Value]],
) -> list[Value]:
    """Returns the totals plus the sums of one group, without their offset, times the scales."""
    offset = isa.constant(-offset_of(g.level), "f32")
    out = list(totals)
    for pair, packed in enumerate(scales):
        pair_scales = [isa.half_to_float(packed, half) for half in ("low", "high")]
        for t in range(g.row_tiles):
            first = accumulator(g, pair // 2, pair % 2, t)
            for i in range(2):
                for j in range(2):
                    k = first + 2 * i + j
                    product = isa.multiply_add(offset, sums[t][j], accumulators[k])
                    out[k] = isa.multiply_add(product, pair_scales[i], totals[k])
    return out


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
