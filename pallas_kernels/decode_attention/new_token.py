"""The new token's queries, key and value: sum, norm, rotation, and storage in shared memory and the cache."""

import dataclasses

from pallas_kernels.decode_attention.lane_context import LaneContext, Refs, Shape
from pallas_kernels.decode_attention.slots import has_new_slot, load_page, new_slot
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.lanes.rows import load_pair, sum_pairs, unpack_bfloat16


@dataclasses.dataclass(frozen=True)
class Fetched:
    """The values of a head that the lane prepares, before norm and rotation: a pair in each half."""

    vector: Value
    """Index of the head among the CTA's: query heads, then the new key and the new value."""
    word: Value
    """Index of the pair in its half."""
    halves: list[list[Value]]
    """The pairs, f32 ``[half][2]``."""
    cos: list[Value]
    """Cosines of the rotation angles of the pair, f32 ``[2]``."""
    sin: list[Value]
    """Sines of these angles, f32 ``[2]``."""
    scales: list[list[Value]] | None
    """``[norm][half]``: the pair's scales in the query norm and the key norm, packed bfloat16."""


def fetch(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    context: LaneContext,
    has_new_token: Value,
    vector: Value,
) -> Fetched:
    """Loads the lane's values of one head, and the operands of its norm and rotation.

    The warp with ``vector < queries_per_kv`` loads that query head. If the CTA has the new token, the warps
    with the next two vectors load its key and its value. All other warps load a query head and do not use it,
    which costs nothing.
    """
    dim, half_words = shape.head_dim, shape.head_dim // 4
    word = context.lane & (half_words - 1)
    is_query, is_key, is_value = roles(shape, vector)
    first_query = context.kv_head * shape.queries_per_kv
    key_head = context.kv_head + shape.queries_per_kv * shape.kv_heads
    other = isa.select(is_key, key_head, key_head + shape.kv_heads)
    head = isa.select(
        is_query,
        first_query + vector,
        isa.select(has_new_token & (is_key | is_value), other, first_query),
    )
    first = context.batch * shape.stored_features + head * dim + word * 2
    stride = shape.batch * shape.stored_features
    # No load depends on another, so all of them are in flight together.
    angle = context.batch * (dim // 2) + word * 2
    cos, sin = (load_pair(isa, ref, angle, ordered=True) for ref in (refs.cos, refs.sin))
    scales = None
    if shape.eps is not None:
        scales = [
            [
                isa.load_global(isa.global_address(a) + isa.widen(word * 4) + offset, ordered=True)[0]
                for offset in (0, dim)
            ]
            for a in (refs.q_scale, refs.k_scale)
        ]
    halves = [
        sum_pairs(isa, refs.qkv, first + offset, stride, shape.num_partials, ordered=True)
        for offset in (0, dim // 2)
    ]
    return Fetched(vector, word, halves, cos, sin, scales)


def prepare(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    context: LaneContext,
    fetched: Fetched,
    shared: Value,
    length: Value,
    has_new_token: Value,
) -> None:
    """Normalizes, rotates and stores the fetched head: in shared memory, and key and value in the cache."""
    dim, half_words, word = shape.head_dim, shape.head_dim // 4, fetched.word
    vector = fetched.vector
    is_query, is_key, is_value = roles(shape, vector)
    cos, sin = fetched.cos, fetched.sin
    raw = [isa.pack_bfloat16(*half) for half in fetched.halves]
    numbers = [unpack_bfloat16(isa, w) for w in raw]
    if shape.eps is not None and fetched.scales is not None:
        total = numbers[0][0] * numbers[0][0]
        for x in (numbers[0][1], *numbers[1]):
            total = isa.multiply_add(x, x, total)
        distance = 1
        while distance < half_words:
            total = total + isa.shuffle_xor(total, distance)
            distance *= 2
        inverse = isa.rsqrt(total * (1 / dim) + shape.eps)
        normed = []
        for half, query_scales, key_scales in zip(numbers, *fetched.scales, strict=True):
            scales = unpack_bfloat16(isa, isa.select(is_query, query_scales, key_scales))
            scaled = [x * inverse * s for x, s in zip(half, scales, strict=True)]
            normed.append(unpack_bfloat16(isa, isa.pack_bfloat16(*scaled)))
        numbers = normed
    low = [a * c - b * s for a, b, c, s in zip(*numbers, cos, sin, strict=True)]
    high = [b * c + a * s for a, b, c, s in zip(*numbers, cos, sin, strict=True)]
    rotated = [isa.pack_bfloat16(*low), isa.pack_bfloat16(*high)]
    words = [isa.select(is_value, w, r) for w, r in zip(raw, rotated, strict=True)]

    stores = (vector < shape.queries_per_kv + 2) & (context.lane < half_words)
    for half, w in enumerate(words):
        isa.store_shared(shared + vector * shape.vector_bytes + word * 4 + half * dim, [w], stores)
    page = load_page(isa, shape, refs, context, length)
    slot = new_slot(shape, context, length, page)
    offset = isa.widen(slot * shape.kv_heads + context.kv_head) * (2 * dim) + isa.widen(word * 4)
    stores_in_cache = stores & has_new_token & has_new_slot(shape, length, page)
    for cache, is_vector in ((refs.keys, is_key), (refs.values, is_value)):
        with isa.when(stores_in_cache & is_vector):
            target = isa.global_address(cache) + offset
            isa.store_global(target, [words[0]])
            isa.store_global(target + dim, [words[1]])


def roles(shape: Shape, vector: Value) -> tuple[Value, Value, Value]:
    """Returns whether a vector is a query, the new key or the new value."""
    return (
        vector < shape.queries_per_kv,
        vector.equals(shape.queries_per_kv),
        vector.equals(shape.queries_per_kv + 1),
    )
