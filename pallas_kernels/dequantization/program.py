"""The lane program that dequantizes a whole weight: it reads every plane once and writes bfloat16 once.

A warp dequantizes a few input channels of one group in one tile of outputs. A lane reads one of the tile's 32
words of each channel and plane. In the last tile, which may have fewer pieces, the other lanes read the first
word again and store nothing. A word holds 16 outputs, which form two runs of 8 consecutive outputs (see
``layout``). With ``chunk = 16 pieces``, which is 128 in a whole tile:

    word                  4 piece + 2 half + pair
    output at             chunk (2 half + (p >> 1)) + 16 piece
    byte b, position p        + 8 pair + 4 (b >> 1) + 2 (p & 1) + (b & 1)

The lane shifts the digits of all planes at one position into one word, which then holds four codes, one in
each byte. A byte permutation turns a code ``c`` into the float32 ``2**23 + c``, whose bits are 4B0000cc. The
arithmetic is exact up to the final rounding to bfloat16, because a code minus its midpoint has 9 bits and a
scale has 11.
"""

import dataclasses
import functools
import operator
from typing import Any

from pallas_kernels import layout
from pallas_kernels.codes import CODE_STEPS, DIGIT_MEAN
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value

THREADS = 128
WARPS = THREADS // LANES

WARP_CHANNELS = 8
"""Number of input channels of a warp: enough to keep loads in flight and to share the 16 converted scales."""

BLOCKS_PER_GROUP = layout.GROUP // (WARPS * WARP_CHANNELS)
"""Number of CTAs for each group of input channels and tile of outputs."""

RUN_OUTPUTS = 8
"""Number of consecutive outputs of a word, which a lane stores as 16 bytes."""

RUNS = layout.WORD_DIGITS // RUN_OUTPUTS
"""Number of runs in a word."""

TWO_TO_23 = 2.0**23
TWO_TO_23_BITS = 0x4B000000
"""Bits of the float32 2**23."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of one launch.

    Attributes:
      in_features: Logical number of input channels.
      out_features: Logical number of outputs, a multiple of ``RUN_OUTPUTS``.
      stored_n: Number of outputs, padded to whole pieces.
      planes: Number of planes that are read, the first of those stored.
      stored_planes: Number of planes that are stored.
      experts: Number of experts, the leading axis of all arrays; None without such an axis.
    """

    in_features: int
    out_features: int
    stored_n: int
    planes: int
    stored_planes: int
    experts: int | None = None

    @property
    def dense(self) -> tuple[int, ...]:
        """Shape of the dequantized weight."""
        one = self.in_features, self.out_features
        return one if self.experts is None else (self.experts, *one)

    @property
    def groups(self) -> int:
        """Number of groups of input channels."""
        return -(-self.in_features // layout.GROUP)

    @property
    def tiles(self) -> int:
        """Number of tiles of outputs."""
        return -(-self.stored_n // layout.TILE)

    @property
    def last_tile_pieces(self) -> int:
        """Number of pieces in the last tile, 1 to 8. All other tiles have 8."""
        return layout.last_tile_pieces(self.stored_n)

    @property
    def weight_blocks(self) -> int:
        """Number of CTAs for one weight."""
        return self.tiles * self.groups * BLOCKS_PER_GROUP

    @property
    def blocks(self) -> int:
        """Number of CTAs."""
        return self.weight_blocks * (self.experts or 1)


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      planes, scales: See ``NestedWeight``, or ``NestedExperts`` if there is an axis of experts.
      dense: Output, bfloat16 ``[*experts, in_features, out_features]``.
      shared: The shared memory, not used.
    """

    planes: Any
    scales: Any
    dense: Any
    shared: Any


def dequantization_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """Runs the whole program of one lane.

    The tile varies fastest over the grid, so that neighbouring CTAs together read whole plane rows. Experts
    vary slowest.
    """
    thread, block = isa.thread_index(), isa.block_index()
    planes, scales, dense = (isa.global_address(ref) for ref in (refs.planes, refs.scales, refs.dense))
    stored_k = shape.groups * layout.GROUP
    stored_words = shape.stored_n // layout.WORD_DIGITS
    if shape.experts is not None:
        # Offsets inside one weight have 32 bits. The offset of an expert has 64.
        expert, block = isa.widen(block // shape.weight_blocks), block % shape.weight_blocks
        planes = planes + expert * (4 * shape.stored_planes * stored_k * stored_words)
        scales = scales + expert * (2 * shape.groups * shape.stored_n)
        dense = dense + expert * (2 * shape.in_features * shape.out_features)
    lane, warp = thread & (LANES - 1), thread >> 5
    tile, channels = block % shape.tiles, block // shape.tiles
    first = (channels * WARPS + warp) * WARP_CHANNELS
    chunk, has_word = chunk_and_word(isa, shape, tile, lane)
    if has_word is not None:
        lane = isa.select(has_word, lane, isa.constant(0))
    word = tile * layout.TILE_WORDS + lane
    words = [
        [
            isa.load_global(planes + isa.widen(((first + f * stored_k + c) * stored_words + word) << 2))[0]
            for f in range(shape.planes)
        ]
        for c in range(WARP_CHANNELS)
    ]
    output = (
        tile * layout.TILE + ((lane >> 1) & 1) * (chunk * 2) + (lane >> 2) * 16 + (lane & 1) * RUN_OUTPUTS
    )
    outputs = [output + chunk * run for run in range(RUNS)]
    group_start = channels // BLOCKS_PER_GROUP * shape.stored_n
    outputs_scales = [load_scales(isa, scales, group_start + n) for n in outputs]
    # A weight is ``scale / 64 * (code - midpoint)``. With the scaled midpoint it takes one multiply-add.
    midpoint = DIGIT_MEAN * sum(4 ** (3 - f) for f in range(shape.planes))
    code_scales = [[s * (1 / CODE_STEPS) for s in run_scales] for run_scales in outputs_scales]
    offsets = [[s * -midpoint for s in run_scales] for run_scales in code_scales]
    for c in range(WARP_CHANNELS):
        for run in range(RUNS):
            codes = [position_codes(words[c], 2 * run + p) for p in range(2)]
            numbers = []
            for i in range(RUN_OUTPUTS):
                byte = 2 * (i >> 2) + (i & 1)
                number = code_to_float(isa, codes[(i >> 1) & 1], byte)
                numbers.append(isa.multiply_add(number, code_scales[run][i], offsets[run][i]))
            packed = [isa.pack_bfloat16(*numbers[i : i + 2]) for i in range(0, RUN_OUTPUTS, 2)]
            index = (first + c) * (shape.out_features // RUN_OUTPUTS) + (outputs[run] >> 3)
            logical = is_logical(isa, shape, first + c, outputs[run])
            with isa.when(logical if has_word is None else logical & has_word):
                isa.store_global(dense + (isa.widen(index) << 4), packed)


def chunk_and_word(
    isa: Instructions, shape: Shape, tile: Value, lane: Value
) -> tuple[Value | int, Value | None]:
    """Returns the outputs of a chunk of the tile, and whether the lane has a word; None if all lanes have."""
    if shape.last_tile_pieces == layout.TILE_PIECES:
        return layout.TILE // 4, None
    is_last = tile.equals(shape.tiles - 1)
    pieces = isa.select(is_last, isa.constant(shape.last_tile_pieces), isa.constant(layout.TILE_PIECES))
    return pieces * 16, lane < pieces * 4


def load_scales(isa: Instructions, scales: Value, index: Value) -> list[Value]:
    """Loads 8 consecutive scales as ``f32``, the first at ``index`` from the address ``scales``."""
    packed = isa.load_global(scales + isa.widen(index << 1), 4)
    return [isa.half_to_float(word, half) for word in packed for half in ("low", "high")]


def position_codes(words: list[Value], position: int) -> Value:
    """Joins the digits at ``position`` of each byte in all planes' words to four codes, one in each byte."""
    digits = []
    for f, word in enumerate(words):
        shift = 6 - 2 * f - 2 * position
        shifted = word << shift if shift >= 0 else word >> -shift
        digits.append(shifted & (0x03030303 << (6 - 2 * f)))
    return functools.reduce(operator.or_, digits)


def code_to_float(isa: Instructions, codes: Value, byte: int) -> Value:
    """Converts one of four codes to ``f32``."""
    bits = isa.permute_bytes(codes, isa.constant(TWO_TO_23_BITS), 0x7650 + byte)
    return isa.bits_to_float(bits) - TWO_TO_23


def is_logical(isa: Instructions, shape: Shape, channel: Value, output: Value) -> Value:
    """Returns whether neither the channel nor the output is padding."""
    logical = isa.constant(True, "bool")
    if shape.in_features % layout.GROUP:
        logical = channel < shape.in_features
    if shape.out_features % layout.TILE:
        logical = logical & (output < shape.out_features)
    return logical
