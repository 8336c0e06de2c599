"""The new token's query, key and value: summed, normed, rotated, put into shared memory and the cache."""

import dataclasses

from pallas_kernels.decode_attention.place import Place, Refs, Shape
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.lanes.rows import load_pair, sum_of_pairs, unpack_bfloat16


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What a lane needs of a head: four of its numbers, two in each half, before norm and rotation."""

    word: Value
    """Of half a head: the lane's pair of numbers in either half."""
    halves: list[list[Value]]
    cos: list[Value]
    sin: list[Value]
    scales: list[list[Value]] | None
    """Packed, of the query norm and of the key norm, for both halves."""


def fetch(isa: Instructions, shape: Shape, refs: Refs, place: Place, takes_new: Value) -> Fetched:
    """Warp h < group takes query head h; where needed, the next warps the new key and the new value.

    Elsewhere those warps take a query head too, which costs nothing, and what they make is not used.
    """
    dim, half_words = shape.head_dim, shape.head_dim // 4
    word = place.lane & (half_words - 1)
    is_query, is_key, is_value = roles(shape, place)
    first_query = place.kv_head * shape.group
    key_head = place.kv_head + shape.group * shape.kv_heads
    other = isa.select(is_key, key_head, key_head + shape.kv_heads)
    head = isa.select(
        is_query,
        first_query + place.warp,
        isa.select(takes_new & (is_key | is_value), other, first_query),
    )
    first = place.batch * shape.stored_columns + head * dim + word * 2
    stride = shape.batch * shape.stored_columns
    # All loads first: none of them waits for another.
    angle = place.batch * (dim // 2) + word * 2
    cos, sin = (load_pair(isa, ref, angle, early=True) for ref in (refs.cos, refs.sin))
    scales = None
    if shape.eps is not None:
        scales = [
            [
                isa.load_global(isa.global_address(a) + isa.widen(word * 4) + offset, early=True)[0]
                for offset in (0, dim)
            ]
            for a in (refs.q_scale, refs.k_scale)
        ]
    halves = [
        sum_of_pairs(isa, refs.qkv, first + offset, stride, shape.parts, early=True)
        for offset in (0, dim // 2)
    ]
    return Fetched(word, halves, cos, sin, scales)


def prepare(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    place: Place,
    fetched: Fetched,
    shared: Value,
    length: Value,
    takes_new: Value,
) -> None:
    """Norm and rotation of what was fetched; to shared memory, key and value to the cache as well."""
    dim, half_words, word = shape.head_dim, shape.head_dim // 4, fetched.word
    is_query, is_key, is_value = roles(shape, place)
    cos, sin = fetched.cos, fetched.sin
    raw = [isa.pack_bfloat16(*half) for half in fetched.halves]
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
        normed = []
        for half, of_query, of_key in zip(numbers, *fetched.scales, strict=True):
            scales = unpack_bfloat16(isa, isa.select(is_query, of_query, of_key))
            scaled = [x * inverse * s for x, s in zip(half, scales, strict=True)]
            normed.append(unpack_bfloat16(isa, isa.pack_bfloat16(*scaled)))
        numbers = normed
    low = [a * c - b * s for a, b, c, s in zip(*numbers, cos, sin, strict=True)]
    high = [b * c + a * s for a, b, c, s in zip(*numbers, cos, sin, strict=True)]
    rotated = [isa.pack_bfloat16(*low), isa.pack_bfloat16(*high)]
    words = [isa.select(is_value, w, r) for w, r in zip(raw, rotated, strict=True)]

    mine = (place.warp < shape.group + 2) & (place.lane < half_words)
    for half, w in enumerate(words):
        isa.store_shared(shared + place.warp * shape.vector_bytes + word * 4 + half * dim, [w], mine)
    slot = (place.batch * shape.capacity + length) * shape.kv_heads + place.kv_head
    offset = isa.widen(slot) * (2 * dim) + isa.widen(word * 4)
    writes = mine & takes_new & (length < shape.capacity)
    for cache, is_mine in ((refs.keys, is_key), (refs.values, is_value)):
        with isa.when(writes & is_mine):
            target = isa.global_address(cache) + offset
            isa.store_global(target, [words[0]])
            isa.store_global(target + dim, [words[1]])


def roles(shape: Shape, place: Place) -> tuple[Value, Value, Value]:
    """Whether the lane's warp has a query, the new key, the new value."""
    return place.warp < shape.group, place.warp.equals(shape.group), place.warp.equals(shape.group + 1)
