"""Merging softmaxes: of a warp's groups, of a CTA's warps, and, in a launch of its own, of the CTAs."""

import dataclasses
from typing import Any

from pallas_kernels.decode_attention.place import (
    CHUNK,
    GROUP_LANES,
    THREADS,
    WARPS,
    Place,
    Refs,
    Shape,
    Softmax,
)
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.lanes.rows import Rows, larger_magnitude, load_pair, locate, store_parts, store_rounded


def merge_in_warp(isa, state: Softmax) -> None:
    """Merges the softmaxes of the warp's 4 groups, in place; all of them end up with the result."""
    for distance in (GROUP_LANES, 2 * GROUP_LANES):
        for head, top in enumerate(state.maxima):
            together = larger(isa, top, isa.shuffle_xor(top, distance))
            shrink = isa.exp2(top - together)
            state.maxima[head] = together
            total = state.sums[head] * shrink
            state.sums[head] = total + isa.shuffle_xor(total, distance)
            mixed = [w * shrink for w in state.weighted[head]]
            state.weighted[head] = [w + isa.shuffle_xor(w, distance) for w in mixed]


def merge_in_block(isa, shape: Shape, refs: Refs, state: Softmax, place: Place, shared: Value) -> None:
    """Merges the warps' softmaxes through shared memory and writes the CTA's result."""
    thread, lane, warp, part = place.thread, place.lane, place.warp, place.part
    dim, heads = shape.head_dim, shape.group
    tops = shared + (heads + 2) * dim * 4
    mixes = tops + WARPS * heads * 8
    for head in range(heads):
        row = warp * heads + head
        isa.store_shared(tops + row * 8, [state.maxima[head], state.sums[head]], lane.equals(0))
        for chunk in range(dim // CHUNK):
            for quarter in (0, 4):
                target = mixes + row * (4 * dim) + part * 32 + (chunk * CHUNK + quarter) * 4
                four = state.weighted[head][8 * chunk + quarter : 8 * chunk + quarter + 4]
                isa.store_shared(target, four, lane < GROUP_LANES)
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
    """``mixed`` and ``tops`` as in ``place.Refs``; written: ``values bf16 [B, heads * D]`` and ``peaks f32
    [B, row parts]``."""

    mixed: Any
    tops: Any
    values: Any
    peaks: Any
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
    outputs = [isa.divide(a, total) for a in (low, high)]
    peak = larger_magnitude(isa, store_rounded(isa, rows, at, refs.values, outputs))
    store_parts(isa, rows, at, refs.shared, [], (refs.peaks, peak))


def larger(isa, a: Value, b: Value) -> Value:
    return isa.select(a < b, b, a)
