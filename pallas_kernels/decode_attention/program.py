"""The attention of one decode step as a lane program: one pass over the cache, one launch.

    cache   ──► 16-byte loads, 8 lanes to a position, two positions ahead ─────────────┐
    partial sums of qkv ──► sum, norm of each query and key head, rotation ──► shared memory
                                       └──► the cache, at the new token's slot         │
    scores ◄──────────────────── queries, new key, new value ◄─────────────────────────┘
       └──► running softmax and weighted values ──► partial result of the CTA

A CTA serves one kv head and its group of query heads, and of the cached positions every ``splits``-th: so
the work is even whatever the length, and the first loads wait for nothing, not even for the length. Each
group of 8 lanes takes a position of its own and keeps a softmax of its own (maximum, sum, weighted values);
they are merged at the end, first in the warp, then in the CTA. ``merge`` is a launch of its own.

The new token's key and value are not read back from the cache: one CTA of each kv head takes them from
shared memory. So no CTA reads what another one writes.
"""

from pallas_kernels.decode_attention.merging import larger, merge_in_block, merge_in_warp
from pallas_kernels.decode_attention.new_token import new_vectors
from pallas_kernels.decode_attention.place import (
    AHEAD,
    CHUNK,
    GROUP_LANES,
    GROUPS,
    NEVER,
    WARPS,
    Refs,
    Shape,
    Softmax,
    locate,
)
from pallas_kernels.lanes.instructions import LANES, Instructions, Value
from pallas_kernels.lanes.rows import unpack_bfloat16


def attention_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """One lane's whole work."""
    place = locate(isa, shape)
    shared = isa.shared_address(refs.shared)
    group = place.thread >> 3

    def position_of(step: Value) -> Value:
        return (step * GROUPS + group) * shape.splits + place.split

    def load(position: Value, exists: Value) -> list[Value]:
        """The packed words of key and value; of any position that exists in place of one that does not."""
        slot = place.batch * shape.capacity + isa.select(exists, position, isa.constant(0))
        row = (slot * shape.kv_heads + place.kv_head) * (shape.head_dim // 8) + place.part
        return cached_words(isa, shape, refs.keys, row) + cached_words(isa, shape, refs.values, row)

    ahead = []
    for step in range(AHEAD):
        position = position_of(isa.constant(step))
        ahead += load(position, position < shape.capacity)
    (length,) = isa.load_global(isa.global_address(refs.lengths) + isa.widen(place.batch * 4), early=True)
    takes_new = place.split.equals(shape.splits - 1)  # It has no more cached positions than any other.
    # Always so, but the compiler cannot know, and would start the loads above after all of this.
    with isa.when(place.block < shape.blocks):
        new_vectors(isa, shape, refs, place, shared, length, takes_new)
    isa.block_barrier()
    queries = [shared_vector(isa, shape, shared, head, place.part) for head in range(shape.group)]

    def attend_next(i: Value, carry: list[Value]) -> list[Value]:
        state, loaded = Softmax.split(carry, shape.group, shape.head_dim // GROUP_LANES)
        further = position_of(i + AHEAD)
        loaded = loaded + load(further, further < length)
        words, later = loaded[: shape.head_dim // 8], loaded[shape.head_dim // 8 :]
        numbers = [number for word in words for number in unpack_bfloat16(isa, word)]
        key, value = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        return attend(isa, queries, state, key, value, position_of(i) < length).flat() + later

    zero = isa.constant(0.0, "f32")
    width = shape.head_dim // GROUP_LANES
    empty = Softmax(
        [isa.constant(NEVER, "f32")] * shape.group, [zero] * shape.group, [[zero] * width] * shape.group
    )
    # Of this split's positions up to the length, those of the warp's first group, which has most.
    of_split = (length + (shape.splits - 1) - place.split) // shape.splits
    first_group = place.warp * (LANES // GROUP_LANES)
    steps = isa.select(
        first_group < of_split, (of_split - first_group + (GROUPS - 1)) // GROUPS, isa.constant(0)
    )
    state, _ = Softmax.split(isa.loop(steps, empty.flat() + ahead, attend_next), shape.group, width)

    def attend_new(_, carry: list[Value]) -> list[Value]:
        state, _ = Softmax.split(carry, shape.group, width)
        key = shared_vector(isa, shape, shared, shape.group, place.part)
        value = shared_vector(isa, shape, shared, shape.group + 1, place.part)
        return attend(isa, queries, state, key, value, place.lane < GROUP_LANES).flat()

    # One group takes the new position, in the warp that has fewest others.
    once = isa.select(takes_new & place.warp.equals(WARPS - 1), isa.constant(1), isa.constant(0))
    state, _ = Softmax.split(isa.loop(once, state.flat(), attend_new), shape.group, width)
    merge_in_warp(isa, state, place.lane)
    merge_in_block(isa, shape, refs, state, place, shared)


def attend(isa, queries, state: Softmax, key: list[Value], value: list[Value], valid: Value) -> Softmax:
    """Takes one more position into the softmax, where ``valid``."""
    maxima, sums, weighted = [], [], []
    for head, query in enumerate(queries):
        score = query[0] * key[0]
        for q, k in zip(query[1:], key[1:], strict=True):
            score = isa.multiply_add(q, k, score)
        for distance in (1, 2, 4):
            score = score + isa.shuffle_xor(score, distance)
        score = isa.select(valid, score, isa.constant(NEVER, "f32"))
        top = larger(isa, state.maxima[head], score)
        shrink = isa.exp2(state.maxima[head] - top)
        weight = isa.select(valid, isa.exp2(score - top), isa.constant(0.0, "f32"))
        maxima.append(top)
        sums.append(isa.multiply_add(state.sums[head], shrink, weight))
        weighted.append(
            [
                isa.multiply_add(weight, v, w * shrink)
                for v, w in zip(value, state.weighted[head], strict=True)
            ]
        )
    return Softmax(maxima, sums, weighted)


def shared_vector(isa, shape: Shape, shared: Value, vector: int, part: Value) -> list[Value]:
    """The lane's share of one of the new vectors, float32."""
    base = shared + vector * shape.head_dim * 4 + part * 32
    return [
        number
        for chunk in range(shape.head_dim // CHUNK)
        for quarter in (0, 4)
        for number in isa.load_shared(base + (chunk * CHUNK + quarter) * 4, 4, "f32")
    ]


def cached_words(isa, shape: Shape, cache, row: Value) -> list[Value]:
    """The lane's share of a key or value in the cache, packed; ``row`` counts 16 bytes."""
    base = isa.global_address(cache) + isa.widen(row) * 16
    return [
        word
        for chunk in range(shape.head_dim // CHUNK)
        for word in isa.load_global(base + chunk * CHUNK * 2, 4, early=True)
    ]
