"""The attention of one decode step as a lane program: one pass over the cache, one launch.

    qkv row ──► norm of each query and key head, rotation ──► shared memory (queries, new key, new value)
                                                     └──────► the cache, at the new token's slot
    cache   ──► 16-byte loads, 8 lanes to a position ──► scores ──► running softmax and weighted values
                                                     ──► partial result of the CTA

A CTA serves one kv head and its group of query heads over one of ``splits`` equal parts of the cached
positions, so the work is spread evenly whatever the length. Each group of 8 lanes takes a position of its
own and keeps a softmax of its own (maximum, sum, weighted values); they are merged at the end, first in
the warp, then in the CTA. The CTAs' results are merged by whoever reads them (``kernel.merge``).

The new token's key and value are not read back from the cache: the first split takes them from shared
memory. So no CTA reads what another one writes.
"""

import dataclasses
import math
from typing import Any

from pallas_kernels.decode_attention.instructions import AttentionInstructions
from pallas_kernels.matvec.mosaic_gpu.instructions import Value

LANES = 32
WARPS = 8
THREADS = WARPS * LANES
GROUP_LANES = 8
"""Lanes that share a position: each loads 16 bytes of every 64 values."""

GROUPS = THREADS // GROUP_LANES
"""Positions that the CTA works on at once."""

UNROLL = 2
"""Positions that each group loads before it computes."""

CHUNK = 8 * GROUP_LANES
"""Values of a head that one 16-byte load of each of the group's lanes covers."""

NEVER = -1e30
"""A score below all others, finite so that differences are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Static sizes. ``eps`` is that of the query and key norms, None without them."""

    batch: int
    kv_heads: int
    group: int
    """Query heads that share a kv head."""
    head_dim: int
    capacity: int
    splits: int
    eps: float | None

    @property
    def blocks(self) -> int:
        return self.batch * self.kv_heads * self.splits

    @property
    def row(self) -> int:
        """Values in one row of qkv."""
        return (self.group + 2) * self.kv_heads * self.head_dim

    @property
    def shared_bytes(self) -> int:
        """New vectors, then every warp's maximum and sum, then its weighted values; all float32."""
        vectors = (self.group + 2) * self.head_dim
        return 4 * (vectors + WARPS * self.group * (2 + self.head_dim))


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the CTA's shared memory.

    ``qkv bf16 [B, row]``, ``cos, sin f32 [B, D / 2]``, ``q_scale, k_scale bf16 [D]``, ``lengths i32 [B]``,
    ``keys, values bf16 [B, S, kv_heads, D]`` (read, and one slot written); written: ``mixed``, the weighted
    values, and ``maxima`` and ``sums`` of the softmax, repeated along D so that merging them needs no
    broadcast; f32 ``[B, kv_heads, splits, group, D]`` each.
    """

    qkv: Any
    cos: Any
    sin: Any
    q_scale: Any
    k_scale: Any
    lengths: Any
    keys: Any
    values: Any
    mixed: Any
    maxima: Any
    sums: Any
    shared: Any


@dataclasses.dataclass
class Softmax:
    """A running softmax for every query head of the group, over the positions seen so far."""

    maxima: list[Value]
    sums: list[Value]
    weighted: list[list[Value]]
    """[head][value]: the lane's share of the head dimension."""

    def flat(self) -> list[Value]:
        return [*self.maxima, *self.sums, *(v for head in self.weighted for v in head)]

    @classmethod
    def of(cls, flat: list[Value], heads: int) -> "Softmax":
        rest = flat[2 * heads :]
        width = len(rest) // heads
        return cls(
            flat[:heads], flat[heads : 2 * heads], [rest[i * width : (i + 1) * width] for i in range(heads)]
        )


def attention_program(isa: AttentionInstructions, shape: Shape, refs: Refs) -> None:
    """One lane's whole work."""
    thread, block = isa.thread_index(), isa.block_index()
    lane, warp = thread & (LANES - 1), thread >> 5
    split, rest = block % shape.splits, block // shape.splits
    kv_head, batch = rest % shape.kv_heads, rest // shape.kv_heads
    shared = isa.shared_address(refs.shared)
    (length,) = isa.load_global(isa.global_address(refs.lengths) + isa.widen(batch * 4))

    new_vectors(isa, shape, refs, (lane, warp, split, kv_head, batch), shared, length)
    isa.block_barrier()
    part = lane & (GROUP_LANES - 1)
    queries = [shared_vector(isa, shape, shared, head, part) for head in range(shape.group)]

    per_split = (length + (shape.splits - 1)) // shape.splits
    start = split * per_split
    end = smaller(isa, start + per_split, length)
    group = thread >> 3
    first = start + group
    at_once = GROUPS * UNROLL
    steps = isa.select(start < end, (end - start + (at_once - 1)) // at_once, isa.constant(0))

    def step(i, carry):
        state = Softmax.of(carry, shape.group)
        positions = [first + i * at_once + u * GROUPS for u in range(UNROLL)]
        valid = [position < end for position in positions]
        rows = []
        for position, inside in zip(positions, valid, strict=True):
            slot = batch * shape.capacity + isa.select(inside, position, isa.constant(0))
            rows.append((slot * shape.kv_heads + kv_head) * (shape.head_dim // 8) + part)
        keys = [cached_vector(isa, shape, refs.keys, row) for row in rows]
        values = [cached_vector(isa, shape, refs.values, row) for row in rows]
        return attend(isa, queries, state, keys, values, valid).flat()

    zero = isa.constant(0.0, "f32")
    width = shape.head_dim // GROUP_LANES
    empty = Softmax(
        [isa.constant(NEVER, "f32")] * shape.group, [zero] * shape.group, [[zero] * width] * shape.group
    )
    state = Softmax.of(isa.loop(steps, empty.flat(), step), shape.group)

    new_key = shared_vector(isa, shape, shared, shape.group, part)
    new_value = shared_vector(isa, shape, shared, shape.group + 1, part)
    takes_new = split.equals(0) & group.equals(0)
    state = attend(isa, queries, state, [new_key], [new_value], [takes_new])
    merge_in_warp(isa, state)
    merge_in_block(isa, shape, refs, state, (thread, lane, warp, part, block), shared)


def new_vectors(isa, shape: Shape, refs: Refs, place, shared: Value, length: Value) -> None:
    """Warp h < group prepares query head h, the next warps the new key and the new value."""
    lane, warp, split, kv_head, batch = place
    dim, half_words = shape.head_dim, shape.head_dim // 4  # words of half a head
    word = lane & (half_words - 1)
    is_query, is_key = warp < shape.group, warp.equals(shape.group)
    is_value = warp.equals(shape.group + 1)
    first_key = shape.group * shape.kv_heads
    key_head = kv_head + first_key
    head = isa.select(
        is_query,
        kv_head * shape.group + warp,
        isa.select(is_key, key_head, key_head + shape.kv_heads),
    )
    source = isa.global_address(refs.qkv) + isa.widen((batch * shape.row + head * dim + word * 2) * 2)
    raw = [isa.load_global(source)[0], isa.load_global(source + dim)[0]]  # dim bytes = half a head
    numbers = [unpack_bfloat16(isa, w) for w in raw]
    if shape.eps is not None:
        total = numbers[0][0] * numbers[0][0]
        for x in (numbers[0][1], *numbers[1]):
            total = isa.multiply_add(x, x, total)
        distance = 1
        while distance < half_words:
            total = total + isa.shuffle_xor(total, distance)
            distance *= 2
        inverse = isa.rsqrt(total * (1 / dim) + shape.eps)
        scale_addresses = [isa.global_address(a) + isa.widen(word * 4) for a in (refs.q_scale, refs.k_scale)]
        normed = []
        for half, offset in zip(numbers, (0, dim), strict=True):
            of_query, of_key = (isa.load_global(address + offset)[0] for address in scale_addresses)
            scales = unpack_bfloat16(isa, isa.select(is_query, of_query, of_key))
            scaled = [x * inverse * s for x, s in zip(half, scales, strict=True)]
            normed.append(unpack_bfloat16(isa, isa.pack_bfloat16(*scaled)))
        numbers = normed
    angle = isa.widen((batch * (dim // 2) + word * 2) * 4)
    cos = isa.load_global(isa.global_address(refs.cos) + angle, 2, "f32")
    sin = isa.load_global(isa.global_address(refs.sin) + angle, 2, "f32")
    low = [a * c - b * s for a, b, c, s in zip(*numbers, cos, sin, strict=True)]
    high = [b * c + a * s for a, b, c, s in zip(*numbers, cos, sin, strict=True)]
    rotated = [isa.pack_bfloat16(*low), isa.pack_bfloat16(*high)]
    words = [isa.select(is_value, w, r) for w, r in zip(raw, rotated, strict=True)]

    unit = isa.select(
        is_query,
        isa.constant(math.log2(math.e) / math.sqrt(dim), "f32"),
        isa.constant(1.0, "f32"),
    )
    mine = (warp < shape.group + 2) & (lane < half_words)
    for half, w in enumerate(words):
        target = shared + warp * (4 * dim) + word * 8 + half * (2 * dim)
        isa.store_shared(target, [x * unit for x in unpack_bfloat16(isa, w)], mine)
    slot = (batch * shape.capacity + length) * shape.kv_heads + kv_head
    offset = isa.widen(slot) * (2 * dim) + isa.widen(word * 4)
    writes = mine & split.equals(0) & (length < shape.capacity)
    for cache, is_mine in ((refs.keys, is_key), (refs.values, is_value)):
        with isa.when(writes & is_mine):
            target = isa.global_address(cache) + offset
            isa.store_global(target, [words[0]])
            isa.store_global(target + dim, [words[1]])


def attend(isa, queries, state: Softmax, keys, values, valid) -> Softmax:
    """Takes further positions into the softmax: ``keys[u]``, ``values[u]`` where ``valid[u]``."""
    maxima, sums, weighted = [], [], []
    for head, query in enumerate(queries):
        scores = []
        for key, inside in zip(keys, valid, strict=True):
            score = query[0] * key[0]
            for q, k in zip(query[1:], key[1:], strict=True):
                score = isa.multiply_add(q, k, score)
            for distance in (1, 2, 4):
                score = score + isa.shuffle_xor(score, distance)
            scores.append(isa.select(inside, score, isa.constant(NEVER, "f32")))
        top = state.maxima[head]
        for score in scores:
            top = larger(isa, top, score)
        shrink = isa.exp2(state.maxima[head] - top)
        total = state.sums[head] * shrink
        mixed = [w * shrink for w in state.weighted[head]]
        for score, value, inside in zip(scores, values, valid, strict=True):
            weight = isa.select(inside, isa.exp2(score - top), isa.constant(0.0, "f32"))
            total = total + weight
            mixed = [isa.multiply_add(weight, v, m) for v, m in zip(value, mixed, strict=True)]
        maxima.append(top)
        sums.append(total)
        weighted.append(mixed)
    return Softmax(maxima, sums, weighted)


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


def merge_in_block(isa, shape: Shape, refs: Refs, state: Softmax, place, shared: Value) -> None:
    """Merges the warps' softmaxes through shared memory and writes the CTA's result."""
    thread, lane, warp, part, block = place
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
            out = isa.widen((block * (heads * dim) + item) * 4)
            for ref, number in ((refs.mixed, mixed), (refs.maxima, top), (refs.sums, total)):
                isa.store_global(isa.global_address(ref) + out, [number])


def shared_vector(isa, shape: Shape, shared: Value, vector: int, part: Value) -> list[Value]:
    """The lane's share of one of the new vectors, float32."""
    base = shared + vector * shape.head_dim * 4 + part * 32
    return [
        number
        for chunk in range(shape.head_dim // CHUNK)
        for quarter in (0, 4)
        for number in isa.load_shared(base + (chunk * CHUNK + quarter) * 4, 4, "f32")
    ]


def cached_vector(isa, shape: Shape, cache, row: Value) -> list[Value]:
    """The lane's share of a key or value in the cache; ``row`` counts 16 bytes."""
    base = isa.global_address(cache) + isa.widen(row) * 16
    return [
        number
        for chunk in range(shape.head_dim // CHUNK)
        for word in isa.load_global(base + chunk * CHUNK * 2, 4)
        for number in unpack_bfloat16(isa, word)
    ]


def unpack_bfloat16(isa, word: Value) -> list[Value]:
    """The two bfloat16 of a word, exactly."""
    return [isa.bits_to_float(word << 16), isa.bits_to_float(word & 0xFFFF0000)]


def larger(isa, a: Value, b: Value) -> Value:
    return isa.select(a < b, b, a)


def smaller(isa, a: Value, b: Value) -> Value:
    return isa.select(a < b, a, b)
