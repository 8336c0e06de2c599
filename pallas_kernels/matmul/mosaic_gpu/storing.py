"""Stores the partial sums of a CTA's part of a tile.

A lane has pairs of neighbouring outputs of some activation rows. The lanes put the sums of an octet of rows
together in shared memory, and then store runs of 64 outputs: without this, the kernel took twice as long for
128 activation rows.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matmul.mosaic_gpu.geometry import (
    OCTET,
    PIECES,
    STAGED_ROW_BYTES,
    THREADS,
    TILE_OUTPUTS,
    Geometry,
)
from pallas_kernels.matmul.mosaic_gpu.lane_context import (
    LaneContext,
    Refs,
    chunk,
    first_chunk,
    output_in_chunk,
    tile_pieces,
)
from pallas_kernels.matmul.mosaic_gpu.operands import POSITIONS

CHUNKS = 4
"""Number of chunks of a tile."""

RUN = TILE_OUTPUTS // CHUNKS
"""Number of neighbouring outputs that a tile has in a chunk."""

SUMS = 4
"""Number of neighbouring sums that a lane stores at once."""

ROW_THREADS = TILE_OUTPUTS // SUMS
"""Number of threads that store a row."""


def store(
    isa: Instructions,
    g: Geometry,
    refs: Refs,
    context: LaneContext,
    stored_tile: Value,
    ends_tile: Value,
    totals: list[Value],
) -> None:
    """Stores the totals ``[position][octet][4]`` of the CTA's half of a stored tile.

    The partial sums of a tile are numbered by its teams. The team with the end of the tile stores zeros as
    the partial sums that the tile does not have, but another one has.
    """
    split = context.team - stored_tile * g.groups // g.units_per_cta
    writer = _Writer(isa, g, refs, context, context.tile(stored_tile))
    for octet in range(g.octets):
        each = [totals[4 * (position * g.octets + octet) :][:4] for position in range(POSITIONS)]
        base = context.shared + (g.staging_base + octet % 2 * g.staged_bytes)
        _stage(isa, context, base, each)
        isa.block_barrier()
        writer.store(split, octet, base)
    with isa.when(ends_tile):

        def body(i: Value, carry: list[Value]) -> list[Value]:
            for octet in range(g.octets):
                writer.store(split + 1 + i, octet, None)
            return carry

        isa.loop(isa.constant(g.splits - 1) - split, [], body)


def _stage(isa: Instructions, context: LaneContext, base: Value, sums: list[list[Value]]) -> None:
    """Puts the lane's sums ``[position][4]`` of an octet into its rows ``[chunk][RUN]`` in shared memory."""
    in_run = (context.piece << 4) + output_in_chunk(context)
    for column in range(2):
        row = ((context.lane & 3) << 1) + column
        for position, four in enumerate(sums):
            output = (first_chunk(context) + position) * RUN + in_run
            address = base + row * STAGED_ROW_BYTES + (output << 2)
            isa.store_shared(address, [isa.float_to_bits(four[i]) for i in (column, column + 2)])


class _Writer:
    """Stores the rows of octets of a tile to global memory. A thread has ``SUMS`` outputs of some rows."""

    def __init__(self, isa: Instructions, g: Geometry, refs: Refs, context: LaneContext, tile: Value):
        self.isa, self.g, self.refs, self.context = isa, g, refs, context
        self.row, in_row = context.thread // ROW_THREADS, context.thread % ROW_THREADS * SUMS
        self.staged = self.row * STAGED_ROW_BYTES + (in_row << 2)
        first, chunk_outputs = chunk(isa, g, tile)
        self.output = first + in_row // RUN * chunk_outputs + in_row % RUN
        pieces = tile_pieces(isa, g, tile)
        self.exists = None if pieces is None else in_row % RUN // (RUN // PIECES) < pieces

    def store(self, split: Value, octet: int, staged: Value | None) -> None:
        """Stores the staged rows of an octet, or zeros, as partial sum number ``split``."""
        isa, g = self.isa, self.g
        for first in range(0, OCTET, THREADS // ROW_THREADS):
            row = self.context.batch * g.rows_per_cta + self.row + (octet * OCTET + first)
            exists = row < g.rows
            with isa.when(exists if self.exists is None else exists & self.exists):
                if staged is None:
                    sums = [isa.constant(0)] * SUMS
                else:
                    sums = isa.load_shared(staged + self.staged + first * STAGED_ROW_BYTES, SUMS)
                offset = isa.widen((split * g.rows + row) * g.stored_n + self.output) << 2
                isa.store_global(isa.global_address(self.refs.partials) + offset, sums)
