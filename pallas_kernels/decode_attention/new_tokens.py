"""The new tokens' queries, keys and values: sum, norm, rotation, and storage."""

import dataclasses
from typing import Any

from pallas_kernels.decode_attention.lane_context import LaneContext, Refs, Shape
from pallas_kernels.decode_attention.slots import has_new_slot, load_page, new_slot
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.launch import WARPGROUP
from pallas_kernels.lanes.registers import Value
from pallas_kernels.lanes.rows import load_pair, sum_pairs, unpack_bfloat16

PREPARE_THREADS = WARPGROUP


@dataclasses.dataclass(frozen=True)
class Head:
    """A head that a warp prepares, before norm and rotation. Each lane holds some words of both halves.

    Attributes:
      words: Indices of the lane's words in a half. A lane without a word repeats word 0.
      halves: ``[word][half]``: pairs of f32.
      cos, sin: ``[word]``: pairs of f32, of the rotation angles.
      scales: ``[word][norm][half]``: scales in the query norm and the key norm, packed bfloat16; or None.
    """

    words: list[Value]
    halves: list[list[list[Value]]]
    cos: list[list[Value]]
    sin: list[list[Value]]
    scales: list[list[list[Value]]] | None


def half_words(shape: Shape) -> int:
    """Returns the number of words in a half of a head."""
    return shape.head_dim // 4


def lane_words(isa: Instructions, shape: Shape, lane: Value) -> list[Value]:
    """Returns the indices of the lane's words in each half of a head."""
    count = half_words(shape)
    if count % LANES == 0:
        return [lane + LANES * i if i else lane & (LANES - 1) for i in range(count // LANES)]
    if LANES % count == 0:
        return [lane & (count - 1)]
    return [isa.select(lane < count, lane, isa.constant(0))]


def has_words(shape: Shape, lane: Value) -> Value:
    """Returns whether the lane has words of a head, which ``lane_words`` does not repeat."""
    return lane < half_words(shape)


def fetch_new_token(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    context: LaneContext,
    has_new_token: Value,
    vector: Value,
) -> Head:
    """Loads one head of the only new token, where ``vector`` counts the heads of the CTA.

    The warp with ``vector < queries_per_kv`` loads that query head. If the CTA has the new token, the warps
    with the next two vectors load its key and its value. All other warps load a query head and do not use it,
    which costs nothing.
    """
    words = lane_words(isa, shape, context.lane)
    is_query, is_key, is_value = roles(shape, vector)
    first_query = context.kv_head * shape.queries_per_kv
    key_head = context.kv_head + shape.queries_per_kv * shape.kv_heads
    other = isa.select(is_key, key_head, key_head + shape.kv_heads)
    head = isa.select(
        is_query,
        first_query + vector,
        isa.select(has_new_token & (is_key | is_value), other, first_query),
    )
    return fetch(isa, shape, refs, context.lane, words, context.batch, head)


def fetch(
    isa: Instructions, shape: Shape, refs: Refs, lane: Value, words: list[Value], token: Value, head: Value
) -> Head:
    """Loads a head of ``qkv``, and the operands of its norm and rotation.

    No load depends on another, so all of them are in flight together.
    """
    dim, num_tokens = shape.head_dim, shape.batch * shape.tokens
    halves, cosines, sines, scales = [], [], [], []
    for word in words:
        first = token * shape.stored_features + head * dim + word * 2
        stride = num_tokens * shape.stored_features
        angle = token * (dim // 2) + word * 2
        cos, sin = (load_pair(isa, ref, angle, ordered=True) for ref in (refs.cos, refs.sin))
        if shape.eps is not None:
            scales.append(
                [
                    [
                        isa.load_global(isa.global_address(a) + isa.widen(word * 4) + offset, ordered=True)[0]
                        for offset in (0, dim)
                    ]
                    for a in (refs.q_scale, refs.k_scale)
                ]
            )
        halves.append(
            [
                sum_pairs(isa, refs.qkv, first + offset, stride, shape.num_partials, ordered=True)
                for offset in (0, dim // 2)
            ]
        )
        cosines.append(cos)
        sines.append(sin)
    return Head(words, halves, cosines, sines, scales or None)


def prepared_words(
    isa: Instructions, shape: Shape, lane: Value, head: Head, is_query: Value, is_value: Value
) -> list[list[Value]]:
    """Normalizes and rotates a head. Returns ``[word][half]``: packed bfloat16. Values are only rounded."""
    dim = shape.head_dim
    raw = [[isa.pack_bfloat16(*half) for half in halves] for halves in head.halves]
    numbers = [[unpack_bfloat16(isa, w) for w in halves] for halves in raw]
    if shape.eps is not None and head.scales is not None:
        first, *others = [x for halves in numbers for half in halves for x in half]
        total = first * first
        for x in others:
            total = isa.multiply_add(x, x, total)
        lanes = min(LANES, half_words(shape))
        if LANES % lanes:  # Lanes beyond the half repeat word 0.
            lanes = LANES
            total = isa.select(has_words(shape, lane), total, isa.constant(0.0, "f32"))
        distance = 1
        while distance < lanes:
            total = total + isa.shuffle_xor(total, distance)
            distance *= 2
        inverse = isa.rsqrt(total * (1 / dim) + shape.eps)
        numbers = [
            [
                _normed(isa, half, inverse, isa.select(is_query, query_scales, key_scales))
                for half, query_scales, key_scales in zip(halves, *scales, strict=True)
            ]
            for halves, scales in zip(numbers, head.scales, strict=True)
        ]
    words = []
    for halves, raw_halves, cos, sin in zip(numbers, raw, head.cos, head.sin, strict=True):
        low = [a * c - b * s for a, b, c, s in zip(*halves, cos, sin, strict=True)]
        high = [b * c + a * s for a, b, c, s in zip(*halves, cos, sin, strict=True)]
        rotated = [isa.pack_bfloat16(*low), isa.pack_bfloat16(*high)]
        words.append([isa.select(is_value, w, r) for w, r in zip(raw_halves, rotated, strict=True)])
    return words


def _normed(isa: Instructions, pair: list[Value], inverse: Value, scales: Value) -> list[Value]:
    """Returns a pair times the inverse norm and its scales, rounded to bfloat16."""
    scaled = [x * inverse * s for x, s in zip(pair, unpack_bfloat16(isa, scales), strict=True)]
    return unpack_bfloat16(isa, isa.pack_bfloat16(*scaled))


def prepare_new_token(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    context: LaneContext,
    vector: Value,
    head: Head,
    shared: Value,
    length: Value,
    has_new_token: Value,
) -> None:
    """Prepares a head of the only new token; stores it in shared memory, and key and value in the cache."""
    is_query, is_key, is_value = roles(shape, vector)
    words = prepared_words(isa, shape, context.lane, head, is_query, is_value)
    stores = (vector < shape.queries_per_kv + 2) & has_words(shape, context.lane)
    for word, halves in zip(head.words, words, strict=True):
        for half, w in enumerate(halves):
            address = shared + vector * shape.vector_bytes + word * 4 + half * shape.head_dim
            isa.store_shared(address, [w], stores)
    if padding := (shape.key_values - shape.head_dim) // 2:
        address = shared + vector * shape.vector_bytes + 2 * shape.head_dim + context.lane * 4
        pads = (vector < shape.queries_per_kv + 2) & (context.lane < padding)
        isa.store_shared(address, [isa.constant(0)], pads)
    targets = ((refs.keys, is_key), (refs.values, is_value))
    place = context.batch, context.kv_head, length
    store_in_cache(isa, shape, refs, place, stores, has_new_token, targets, head, words)


def store_in_cache(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    place: tuple[Value, Value, Value],
    stores: Value,
    owns: Value,
    targets: tuple[tuple[Any, Value], ...],
    head: Head,
    words: list[list[Value]],
) -> None:
    """Stores a key or a value in the cache, if the row has a slot for its position.

    Args:
      isa, shape, refs: As in ``fetch``.
      place: Sequence, kv head and position of the vector.
      stores: Whether the lane has words to store.
      owns: Whether the vector is one of the caller's.
      targets: ``(cache, whether the vector belongs to it)`` for keys and for values.
      head, words: The vector, as ``fetch`` and ``prepared_words`` return it.
    """
    batch, kv_head, position = place
    page = load_page(isa, shape, refs, batch, position)
    slot = new_slot(shape, batch, position, page)
    vector = isa.widen(slot * shape.kv_heads + kv_head) * (2 * shape.head_dim)
    offsets = [vector + isa.widen(word * 4) for word in head.words]
    stores = stores & owns & has_new_slot(shape, position, page)
    for cache, is_vector in targets:
        with isa.when(stores & is_vector):
            for offset, halves in zip(offsets, words, strict=True):
                _store_halves(isa, shape, isa.global_address(cache) + offset, halves)


def _store_halves(isa: Instructions, shape: Shape, target: Value, halves: list[Value]) -> None:
    isa.store_global(target, [halves[0]])
    isa.store_global(target + shape.head_dim, [halves[1]])


def roles(shape: Shape, vector: Value) -> tuple[Value, Value, Value]:
    """Returns whether a vector is a query, the new key or the new value."""
    return (
        vector < shape.queries_per_kv,
        vector.equals(shape.queries_per_kv),
        vector.equals(shape.queries_per_kv + 1),
    )


def prepare_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """Prepares all heads of several new tokens, one in each warp; writes ``Refs``' queries and new vectors.

    Keys and values also go to the cache. The next launch reads all of these.
    """
    thread = isa.thread_index()
    lane = thread & (LANES - 1)
    heads = shape.queries_per_kv * shape.kv_heads
    all_heads, warps = heads + 2 * shape.kv_heads, PREPARE_THREADS // LANES
    index = isa.block_index() * warps + (thread >> 5)
    exists = index < shape.batch * shape.tokens * all_heads
    index = isa.select(exists, index, isa.constant(0))
    token, head = index // all_heads, index % all_heads
    batch, offset = token // shape.tokens, token % shape.tokens
    (length,) = isa.load_global(isa.global_address(refs.lengths) + isa.widen(batch * 4), ordered=True)
    fetched = fetch(isa, shape, refs, lane, lane_words(isa, shape, lane), token, head)
    is_query, is_key = head < heads, head < heads + shape.kv_heads
    is_value = ~is_key
    is_key = is_key & ~is_query
    words = prepared_words(isa, shape, lane, fetched, is_query, is_value)
    stores = exists & has_words(shape, lane)
    kv_head, query = head // shape.queries_per_kv, head % shape.queries_per_kv
    row = (batch * shape.kv_heads + kv_head) * shape.rows + offset * shape.queries_per_kv + query
    other = isa.select(is_key, head - heads, head - (heads + shape.kv_heads))
    new = token * shape.kv_heads + other
    for target, vector, is_target in (
        (refs.queries, row, is_query),
        (refs.new_keys, new, is_key),
        (refs.new_values, new, is_value),
    ):
        with isa.when(stores & is_target):
            base = isa.global_address(target) + isa.widen(vector) * (2 * shape.head_dim)
            for word, halves in zip(fetched.words, words, strict=True):
                _store_halves(isa, shape, base + isa.widen(word * 4), halves)
    targets = ((refs.keys, is_key), (refs.values, is_value))
    place = batch, other, length + offset
    store_in_cache(isa, shape, refs, place, stores, ~is_query, targets, fetched, words)


def prepare_blocks(shape: Shape) -> int:
    """Returns the number of CTAs of ``prepare_program``."""
    heads = shape.batch * shape.tokens * (shape.queries_per_kv + 2) * shape.kv_heads
    return -(-heads // (PREPARE_THREADS // LANES))
