"""The attention of one decode step as a lane program: one pass over the cache, one launch.

    partial sums of qkv ──► sum, norm of each query and key head, rotation ──► shared memory
                                       └──► the cache, at the new token's slot          │
    cache ──► scores ◄────────── queries, new key, new value ◄──────────────────────────┘
                └──► running softmax and weighted values ──► partial result of the CTA

A CTA serves one kv head and its group of query heads, and of the cached positions every ``splits``-th: so
the work is even whatever the length. The first loads of the cache wait for the length only. Each warp takes
16 positions at a time and keeps a softmax of its own (maximum, sum, weighted values); they are merged at the
end, first in the CTA; ``merge`` is a launch of its own.

Both products run on the matrix unit. Its operands are read from the cache as they lie there, since a sum
over the values of a head may run in any order, and weighted values may come out in any:

    scores   [heads, 8 positions] = queries [heads, values] @ keys^T: a lane holds position ``row`` and of
             every 32 values the 8 from ``8 column`` on; two such products make 16 positions
    weighted [heads, 8 values] += weights [heads, 16 positions] @ values: a lane holds positions ``2 column,
             + 1, + 8, + 9``, which are those of its scores, and of every 64 values the 8 from ``8 row`` on;
             block ``i`` of the 8 that a chunk makes has the i-th value of each of the 8 rows

The new token's key and value are not read back from the cache: one CTA of each kv head takes them from
shared memory. So no CTA reads what another one writes.
"""

import math

from pallas_kernels.decode_attention.merging import larger, merge_in_block
from pallas_kernels.decode_attention.new_token import fetch, prepare
from pallas_kernels.decode_attention.place import (
    BLOCK_POSITIONS,
    CHUNK,
    NEVER,
    STEP_POSITIONS,
    WARPS,
    Place,
    Refs,
    Shape,
    Softmax,
    locate,
)
from pallas_kernels.lanes.instructions import Instructions, Value

KEYS_OF_LANE = 2
"""Positions of which a lane has keys: ``row`` and ``row + 8``."""

VALUES_OF_LANE = (0, 1, 8, 9)
"""Positions of which it has scores and values, from ``2 column`` on."""


def attention_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """One lane's whole work."""
    place = locate(isa, shape)
    shared = isa.shared_address(refs.shared)

    def position(step: Value, index: Value) -> Value:
        """Of the warp's ``index``-th position of a step."""
        of_split = step * BLOCK_POSITIONS + place.warp * STEP_POSITIONS + index
        return of_split * shape.splits + place.split

    def load(step: Value, limit: Value) -> list[Value]:
        """The packed words of the lane's keys, then values; of position 0 in place of those from limit on."""
        words = []
        for k in range(KEYS_OF_LANE):
            words += key_words(isa, shape, refs, place, position(step, place.row + 8 * k), limit)
        for v in VALUES_OF_LANE:
            words += value_words(isa, shape, refs, place, position(step, place.column * 2 + v), limit)
        return words

    (length,) = isa.load_global(isa.global_address(refs.lengths) + isa.widen(place.batch * 4), early=True)
    takes_new = place.split.equals(shape.splits - 1)  # It has no more cached positions than any other.
    # The barriers keep the compiler from starting these loads later, or in another order: they cost nothing.
    fetched = fetch(isa, shape, refs, place, takes_new)
    isa.warp_barrier()
    words = load(isa.constant(0), length)
    isa.warp_barrier()
    prepare(isa, shape, refs, place, fetched, shared, length, takes_new)
    isa.block_barrier()
    head = isa.select(place.row < shape.group, place.row, isa.constant(shape.group - 1))
    queries = shared_keys(isa, shape, place, shared + head * shape.vector_bytes)
    zero = isa.constant(0.0, "f32")
    state = Softmax(isa.constant(NEVER, "f32"), zero, [zero] * (shape.head_dim // 4))

    def attend_new(_, carry: list[Value]) -> list[Value]:
        """The new token as the first of 16 positions, of which no other one is valid."""
        vectors, nothing = shared + shape.group * shape.vector_bytes, isa.constant(0)
        key = shared_keys(isa, shape, place, vectors)
        value = shared_values(isa, shape, place, vectors + shape.vector_bytes)
        first = [isa.select(place.row.equals(0), word, nothing) for word in key]
        first += [nothing] * (len(key) * (KEYS_OF_LANE - 1))
        first += [isa.select(place.column.equals(0), word, nothing) for word in value]
        first += [nothing] * (len(value) * (len(VALUES_OF_LANE) - 1))
        valid = [place.column.equals(0)] + [place.column < 0] * (len(VALUES_OF_LANE) - 1)
        return attend(isa, shape, queries, Softmax.split(carry, shape.head_dim)[0], first, valid).flat()

    def attend_next(step: Value, carry: list[Value]) -> list[Value]:
        state, words = Softmax.split(carry, shape.head_dim)
        valid = [position(step, place.column * 2 + v) < length for v in VALUES_OF_LANE]
        state = attend(isa, shape, queries, state, words, valid)
        return state.flat() + load(step + 1, length)

    # The last warp takes the new token, as it has fewest others, and first, while the cache is on its way.
    once = isa.select(takes_new & place.warp.equals(WARPS - 1), isa.constant(1), isa.constant(0))
    state, _ = Softmax.split(isa.loop(once, state.flat(), attend_new), shape.head_dim)
    # Of this split's positions up to the length, those of this warp.
    of_split = (length + (shape.splits - 1) - place.split) // shape.splits
    first = place.warp * STEP_POSITIONS
    steps = isa.select(
        first < of_split, (of_split - first + (BLOCK_POSITIONS - 1)) // BLOCK_POSITIONS, isa.constant(0)
    )
    state, _ = Softmax.split(isa.loop(steps, state.flat() + words, attend_next), shape.head_dim)
    merge_in_block(isa, shape, refs, state, place, shared)


def attend(
    isa: Instructions,
    shape: Shape,
    queries: list[Value],
    state: Softmax,
    words: list[Value],
    valid: list[Value],
) -> Softmax:
    """Takes 16 positions into the softmax, those that are ``valid``; ``words`` as ``load`` has them."""
    zero, nothing = isa.constant(0.0, "f32"), isa.constant(0)
    of_key, of_value = shape.head_dim // 8, shape.head_dim // 16
    keys = [words[k * of_key : (k + 1) * of_key] for k in range(KEYS_OF_LANE)]
    rest = words[KEYS_OF_LANE * of_key :]
    values = [rest[v * of_value : (v + 1) * of_value] for v in range(len(VALUES_OF_LANE))]
    scores = []
    for key in keys:
        sums = [zero] * 4
        for i in range(0, of_key, 2):
            heads = [queries[i], nothing, queries[i + 1], nothing]  # Rows from 8 on are empty.
            sums = isa.matrix_multiply_add_bfloat16(sums, heads, key[i : i + 2])
        scores += sums[:2]
    unit = math.log2(math.e) / math.sqrt(shape.head_dim)
    never = isa.constant(NEVER, "f32")
    scores = [isa.select(ok, score * unit, never) for ok, score in zip(valid, scores, strict=True)]
    top = state.maximum
    for score in scores:
        top = larger(isa, top, score)
    for distance in (1, 2):
        top = larger(isa, top, isa.shuffle_xor(top, distance))
    shrink = isa.exp2(state.maximum - top)
    weights = [isa.select(ok, isa.exp2(s - top), zero) for ok, s in zip(valid, scores, strict=True)]
    total = state.total * shrink
    for weight in weights:
        total = total + weight
    heads = [isa.pack_bfloat16(*weights[:2]), nothing, isa.pack_bfloat16(*weights[2:]), nothing]
    mixed = []
    for block in range(shape.head_dim // 8):
        word, selector = block // 2, (0x5410, 0x7632)[block % 2]
        pairs = [isa.permute_bytes(values[v][word], values[v + 1][word], selector) for v in (0, 2)]
        sums = [m * shrink for m in state.mixed[2 * block : 2 * block + 2]] + [zero, zero]
        mixed += isa.matrix_multiply_add_bfloat16(sums, heads, pairs)[:2]
    return Softmax(top, total, mixed)


def key_words(isa, shape: Shape, refs: Refs, place: Place, position: Value, limit: Value) -> list[Value]:
    """Of a cached key the lane's share as an operand of the scores."""
    base = cached(isa, shape, refs.keys, place, position, limit) + isa.widen(place.column * 16)
    return [
        word
        for t in range(shape.head_dim // 32)
        for word in isa.load_global(base + t * 64, 4, early=True, once=True)
    ]


def value_words(isa, shape: Shape, refs: Refs, place: Place, position: Value, limit: Value) -> list[Value]:
    """Of a cached value the lane's share as an operand of the weighted values."""
    base = cached(isa, shape, refs.values, place, position, limit) + isa.widen(place.row * 16)
    chunks = range(shape.head_dim // CHUNK)
    return [word for c in chunks for word in isa.load_global(base + c * 2 * CHUNK, 4, early=True, once=True)]


def cached(isa, shape: Shape, cache, place: Place, position: Value, limit: Value) -> Value:
    """Address of this kv head's vector at a position, or, from ``limit`` on, at position 0."""
    slot = place.batch * shape.capacity + isa.select(position < limit, position, isa.constant(0))
    row = slot * shape.kv_heads + place.kv_head
    return isa.global_address(cache) + isa.widen(row) * shape.vector_bytes


def shared_keys(isa, shape: Shape, place: Place, vector: Value) -> list[Value]:
    """Of a vector in shared memory the same share as ``key_words``."""
    base = vector + place.column * 16
    return [word for t in range(shape.head_dim // 32) for word in isa.load_shared(base + t * 64, 4)]


def shared_values(isa, shape: Shape, place: Place, vector: Value) -> list[Value]:
    """Of a vector in shared memory the same share as ``value_words``."""
    base = vector + place.row * 16
    return [w for c in range(shape.head_dim // CHUNK) for w in isa.load_shared(base + c * 2 * CHUNK, 4)]
