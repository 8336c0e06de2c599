"""Dequantizing a whole weight, as a lane program: every plane read once, bfloat16 written once.

A warp takes one tile of 512 outputs and a few input channels of one slice. A lane takes one of the
tile's 32 words of each channel and plane, i.e. 16 outputs, which lie in two runs of 8 (``layout``):

    word  4 row + 2 half + c           n = 256 half + 128 (p >> 1) + 16 row + 8 c
    digit position p of byte b           + 4 (b >> 1) + 2 (p & 1) + (b & 1)

The digits of all planes at position p are shifted into one word of four codes, one to a byte. A byte
becomes a float by a byte permutation: 4B0000cc is ``2**23 + c``. All of it is exact up to the rounding to
bfloat16: a code less its middle has 9 bits, a scale 11.
"""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.codes import CODE_STEPS, DIGIT_MEAN
from pallas_kernels.lanes.instructions import LANES, Instructions, Value

THREADS = 128
WARPS = THREADS // LANES

WARP_CHANNELS = 8
"""Input channels of a warp: enough loads in flight, and 16 scales that are converted once for all of them."""

BLOCKS_PER_SLICE = layout.GROUP // (WARPS * WARP_CHANNELS)

OUTPUTS_AT_ONCE = 8
"""Consecutive outputs that a lane has, and stores as 16 bytes."""

RUNS = layout.WORD_DIGITS // OUTPUTS_AT_ONCE

TWO_TO_23 = 2.0**23
TWO_TO_23_BITS = 0x4B000000


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes."""

    in_features: int
    out_features: int
    """A multiple of ``OUTPUTS_AT_ONCE``."""
    stored_n: int
    planes: int

    @property
    def slices(self) -> int:
        return -(-self.in_features // layout.GROUP)

    @property
    def tiles(self) -> int:
        return self.stored_n // layout.TILE

    @property
    def blocks(self) -> int:
        return self.tiles * self.slices * BLOCKS_PER_SLICE


@dataclasses.dataclass(frozen=True)
class Refs:
    """``planes`` and ``scales`` of the weight; written: ``dense bf16 [in_features, out_features]``."""

    planes: Any
    scales: Any
    dense: Any
    shared: Any


def dequantization_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """One lane's whole work. Tiles run fastest over the grid, so that neighbours read whole rows."""
    thread, block = isa.thread_index(), isa.block_index()
    lane, warp = thread & (LANES - 1), thread >> 5
    tile, part = block % shape.tiles, block // shape.tiles  # of ``slices * BLOCKS_PER_SLICE``
    first = (part * WARPS + warp) * WARP_CHANNELS
    stored_words = shape.stored_n // layout.WORD_DIGITS
    word = tile * layout.TILE_WORDS + lane
    planes = isa.global_address(refs.planes)
    stored_k = shape.slices * layout.GROUP
    words = [
        [
            isa.load_global(planes + isa.widen(((first + f * stored_k + c) * stored_words + word) << 2))[0]
            for f in range(shape.planes)
        ]
        for c in range(WARP_CHANNELS)
    ]
    output = tile * layout.TILE + ((lane >> 1) & 1) * 256 + (lane >> 2) * 16 + (lane & 1) * OUTPUTS_AT_ONCE
    outputs = [output + run * 128 for run in range(RUNS)]
    slice_start = part // BLOCKS_PER_SLICE * shape.stored_n
    scales = [load_scales(isa, refs, slice_start + n) for n in outputs]
    # ``scale / 64 * (code - middle)``: one multiply-add, once the middle is multiplied, too.
    middle = DIGIT_MEAN * sum(4 ** (3 - f) for f in range(shape.planes))
    steps = [[s * (1 / CODE_STEPS) for s in of_run] for of_run in scales]
    middles = [[s * -middle for s in of_run] for of_run in steps]
    dense = isa.global_address(refs.dense)
    for c in range(WARP_CHANNELS):
        for run in range(RUNS):
            codes = [position_codes(words[c], 2 * run + p) for p in range(2)]
            numbers = []
            for i in range(OUTPUTS_AT_ONCE):
                byte = 2 * (i >> 2) + (i & 1)
                number = code_to_float(isa, codes[(i >> 1) & 1], byte)
                numbers.append(isa.multiply_add(number, steps[run][i], middles[run][i]))
            packed = [isa.pack_bfloat16(*numbers[i : i + 2]) for i in range(0, OUTPUTS_AT_ONCE, 2)]
            index = (first + c) * (shape.out_features // OUTPUTS_AT_ONCE) + (outputs[run] >> 3)
            with isa.when(exists(isa, shape, first + c, outputs[run])):
                isa.store_global(dense + (isa.widen(index) << 4), packed)


def load_scales(isa: Instructions, refs: Refs, index: Value) -> list[Value]:
    """8 consecutive scales, the first one at ``index``."""
    packed = isa.load_global(isa.global_address(refs.scales) + isa.widen(index << 1), 4)
    return [isa.half_to_float(word, which) for word in packed for which in ("low", "high")]


def position_codes(words: list[Value], position: int) -> Value:
    """Four codes, one to a byte: of each byte of the planes' words the digits at ``position``."""
    codes = None
    for f, word in enumerate(words):
        shift = 6 - 2 * f - 2 * position
        shifted = word << shift if shift >= 0 else word >> -shift
        digits = shifted & (0x03030303 << (6 - 2 * f))
        codes = digits if codes is None else codes | digits
    return codes


def code_to_float(isa: Instructions, codes: Value, byte: int) -> Value:
    """One of the four codes as ``f32``."""
    bits = isa.permute_bytes(codes, isa.constant(TWO_TO_23_BITS), 0x7650 + byte)
    return isa.bits_to_float(bits) - TWO_TO_23


def exists(isa: Instructions, shape: Shape, channel: Value, output: Value) -> Value:
    """Whether this is no padding."""
    inside = isa.constant(True, "bool")
    if shape.in_features % layout.GROUP:
        inside = channel < shape.in_features
    if shape.out_features % layout.TILE:
        inside = inside & (output < shape.out_features)
    return inside
