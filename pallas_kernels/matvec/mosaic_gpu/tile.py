"""The outputs of a tile. The last tile of a row may have fewer pieces than the others (see ``layout``).

Where all tiles of a launch are whole, these functions emit no instruction.
"""

from pallas_kernels import layout
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry

WHOLE_CHUNK = layout.TILE // 4
"""Number of outputs in a chunk of a whole tile, 128."""


def pieces_of_tile(isa: Instructions, g: Geometry, tile: Value) -> Value | None:
    """Returns the number of pieces of a tile, or None if all tiles of the launch are whole."""
    if g.last_tile_pieces == layout.TILE_PIECES:
        return None
    last = isa.constant(g.last_tile_pieces)
    if g.tiles == 1:
        return last
    return isa.select(tile < g.tiles - 1, isa.constant(layout.TILE_PIECES), last)


def stored_piece(isa: Instructions, piece: Value, pieces: Value | None) -> Value:
    """Returns the piece, or piece 0, which every tile has, if a tile of ``pieces`` pieces lacks it.

    A lane without a piece copies the bytes of piece 0 again, and multiplies them. Lanes that read the same
    bytes cost no bandwidth, and no output depends on the product.
    """
    return piece if pieces is None else isa.select(piece < pieces, piece, isa.constant(0))


def stored_output(isa: Instructions, output: Value, pieces: Value) -> tuple[Value, Value]:
    """Returns the place of an output in a tile of ``pieces`` pieces, and whether the tile has the output.

    Args:
      isa: The instructions.
      output: Output of a whole tile: chunk ``output // 128``, and the place in the chunk.
      pieces: Number of pieces of the tile.

    Returns:
      The output's index in the tile, 0 if the tile lacks it; and whether the tile has it.
    """
    in_chunk, size = output % WHOLE_CHUNK, chunk_outputs(pieces)
    exists = in_chunk < size
    return isa.select(exists, output // WHOLE_CHUNK * size + in_chunk, isa.constant(0)), exists


def chunk_outputs(pieces: Value | None) -> Value | int:
    """Returns the number of outputs in a chunk: the distance of the outputs of neighbouring chunks."""
    return WHOLE_CHUNK if pieces is None else pieces << 4
