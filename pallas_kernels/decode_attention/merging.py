"""Merging softmaxes: of a CTA's warps, and, in a launch of its own, of the CTAs."""

import dataclasses
from typing import Any

from pallas_kernels.decode_attention.place import CHUNK, THREADS, WARPS, Place, Refs, Shape, Softmax
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.lanes.rows import Rows, load_pair, locate, store_rounded


def merge_in_block(isa, shape: Shape, refs: Refs, state: Softmax, place: Place, shared: Value) -> None:
    """Merges the warps' softmaxes through shared memory and writes the CTA's result."""
    thread, warp, dim, heads = place.thread, place.warp, shape.head_dim, shape.group
    tops, mixes = shared + shape.tops_base, shared + shape.mixes_base
    total = state.total
    for distance in (1, 2):
        total = total + isa.shuffle_xor(total, distance)
    is_head, mine = place.row < heads, warp * heads + place.row
    isa.store_shared(tops + mine * 8, [state.maximum, total], is_head & place.column.equals(0))
    for chunk in range(dim // CHUNK):
        for half in range(2):  # Blocks of a chunk follow one another: a lane has 16 consecutive values of it.
            target = mixes + mine * (4 * dim) + place.column * 64 + (chunk * CHUNK + half * 8) * 4
            run = [state.mixed[2 * (chunk * 8 + block) + half] for block in range(8)]
            isa.store_shared(target, run[:4], is_head)
            isa.store_shared(target + 16, run[4:], is_head)
    isa.block_barrier()
    for begin in range(0, heads * dim, THREADS):
        item = thread + begin
        with isa.when(item < heads * dim):
            head, value = item // dim, item % dim
            pairs = [isa.load_shared(tops + (head + w * heads) * 8, 2, "f32") for w in range(WARPS)]
            top = pairs[0][0]
            for other, _ in pairs[1:]:
                top = larger(isa, top, other)
            total, mixed = isa.constant(0.0, "f32"), isa.constant(0.0, "f32")
            for w, (other, part_sum) in enumerate(pairs):
                shrink = isa.exp2(other - top)
                (mix,) = isa.load_shared(mixes + (head + w * heads) * (4 * dim) + value * 4, 1, "f32")
                total = isa.multiply_add(shrink, part_sum, total)
                mixed = isa.multiply_add(shrink, mix, mixed)
            out = place.block * (heads * dim) + item
            isa.store_global(isa.global_address(refs.mixed) + isa.widen(out << 2), [mixed])
            with isa.when(value.equals(0)):
                pair = place.block * heads + head
                isa.store_global(isa.global_address(refs.tops) + isa.widen(pair << 3), [top, total])


@dataclasses.dataclass(frozen=True)
class MergeRefs:
    """``mixed`` and ``tops`` as in ``place.Refs``; written: ``values bf16 [B, heads * D]``."""

    mixed: Any
    tops: Any
    values: Any
    shared: Any


def merge_program(isa: Instructions, shape: Shape, rows: Rows, refs: MergeRefs) -> None:
    """The softmax over all splits: ``sum(w * mixed) / sum(w * sum)`` with ``w = 2**(maximum - largest)``."""
    at = locate(isa, rows)
    head, value = at.column // shape.head_dim, at.column % shape.head_dim
    kv_head, of_group = head // shape.group, head % shape.group
    first = (at.row * shape.kv_heads + kv_head) * (shape.splits * shape.group) + of_group
    softmaxes = [first + split * shape.group for split in range(shape.splits)]
    pairs = [load_pair(isa, refs.tops, softmax * 2) for softmax in softmaxes]
    mixes = [load_pair(isa, refs.mixed, softmax * shape.head_dim + value) for softmax in softmaxes]
    top = pairs[0][0]
    for maximum, _ in pairs[1:]:
        top = larger(isa, top, maximum)
    zero = isa.constant(0.0, "f32")
    total, low, high = zero, zero, zero
    for (maximum, part_sum), (a, b) in zip(pairs, mixes, strict=True):
        weight = isa.exp2(maximum - top)
        total = isa.multiply_add(weight, part_sum, total)
        low, high = isa.multiply_add(weight, a, low), isa.multiply_add(weight, b, high)
    store_rounded(isa, rows, at, refs.values, [isa.divide(a, total) for a in (low, high)])


def larger(isa, a: Value, b: Value) -> Value:
    return isa.select(a < b, b, a)
