"""The lane programs of decode attention: one launch reads the cache once.

    partial sums of qkv ──► sum, norm of each query and key head, rotation ──► shared memory
                                       └──► the cache, at the new token's slot          │
    cache ──► scores ◄────────── queries, new key, new value ◄──────────────────────────┘
                └──► online softmax and weighted values ──► partial result of the CTA

A CTA computes one key-value head with its query heads. A split is every ``splits``-th cached position, so the
work is balanced at every length. A CTA attends to one split, or to several, whose work its warps divide (see
``shares``). If shared memory cannot hold the results of shares, it attends to one split after another. The
first loads of the cache wait only for the length. Each warp attends to 16 positions in one step and has a
separate online softmax: running max, running sum and accumulator. The CTA merges the softmaxes of the warps.
A last launch, ``merging.merge_program``, merges those of the splits.

With several new tokens of a sequence, another launch, ``new_tokens.prepare_program``, prepares them first and
writes them to the cache. ``several_tokens_program`` then attends from all of them at once: a query row is one
query head of one token, and a CTA has up to 64 rows of a key-value head. Earlier new tokens are cached
positions. Each token attends to itself as in the program of one token.

The output of a query row has the same bits in any launch: rows do not affect each other, splits and steps
depend on positions alone, and a step in which a row attends to no position does not change its softmax.

Both products run on the matrix unit, and the lanes load its operands from the cache without rearranging them.
This works because a sum over the values of a head may run in any order, and because the weighted values may
come out in any order. With ``row`` and ``column`` of ``Instructions.matrix_multiply_add``:

    scores   [heads, 8 positions] = queries [heads, values] @ keys^T
             A lane holds values ``8 column`` to ``8 column + 7`` of every 32 values of the key at position
             ``row``. Two such products cover 16 positions.
    weighted [heads, 8 values] += weights [heads, 16 positions] @ values
             A lane holds values ``8 row`` to ``8 row + 7`` of every 64 values (a chunk) at the positions of
             its scores, ``2 column, + 1, + 8, + 9``. A chunk gives 8 blocks of 8 weighted values. Block ``i``
             consists of the i-th value of each of the 8 rows.

The new token's key and value are not read back from the cache: one CTA of each key-value head reads them from
shared memory. No CTA therefore reads memory that another CTA writes.
"""

from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels.decode_attention.cached_positions import (
    LANE_KEYS,
    LANE_VALUES,
    CachedPositions,
    Loaded,
    key_indices,
    load_key,
    load_value,
    smaller,
    value_indices,
)
from pallas_kernels.decode_attention.lane_context import (
    CHUNK,
    KEY_CHUNK,
    OCTET,
    THREADS,
    WARPS,
    LaneContext,
    Refs,
    Shape,
    lane_context,
)
from pallas_kernels.decode_attention.merging import merge_in_block
from pallas_kernels.decode_attention.new_tokens import fetch_new_token, prepare_new_token
from pallas_kernels.decode_attention.online_softmax import OnlineSoftmax, Queries, attend
from pallas_kernels.decode_attention.shares import Shares, attend_shares
from pallas_kernels.decode_attention.split import AttendOwn, attend_split, token_of_row
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value


def attention_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """Runs the whole program of one lane, for one new token of each sequence."""
    context = lane_context(isa, shape)
    shared = isa.shared_address(refs.shared)
    (length,) = isa.load_global(isa.global_address(refs.lengths) + isa.widen(context.batch * 4), ordered=True)
    # The last split has the fewest cached positions, so it attends to the new token.
    has_new_token = context.split.equals(shape.splits - shape.splits_per_block)
    # Each warp prepares one head, or, with more than 6 query heads for a key, some warps prepare two.
    vectors = [context.warp] + [context.warp + WARPS * i for i in range(1, -(-shape.vectors // WARPS))]
    # The barriers keep the compiler from delaying or reordering these loads. They cost nothing.
    fetched = [fetch_new_token(isa, shape, refs, context, has_new_token, vector) for vector in vectors]
    isa.warp_barrier()
    cache = CachedPositions.create(isa, shape, refs, context, length)
    shares = Shares.create(isa, shape, context, cache) if shape.divides_shares else None
    loaded = load_first_step(isa, context, cache) if shares is None else shares.load_first()
    isa.warp_barrier()
    for vector, head in zip(vectors, fetched, strict=True):
        prepare_new_token(isa, shape, refs, context, vector, head, shared, length, has_new_token)
    isa.block_barrier()
    last = shape.queries_per_kv - 1
    query = shared + isa.select(context.row < last + 1, context.row, isa.constant(last)) * shape.vector_bytes
    words = [] if shape.late_values else shared_key_words(isa, shape, context, query)

    def queries(octet: int) -> list[Value]:
        return words or shared_key_words(isa, shape, context, query)

    def attend_own(softmaxes: list[OnlineSoftmax]) -> list[OnlineSoftmax]:
        """Attends to 16 positions of which only the first is valid: the new token."""
        vectors, empty = shared + shape.queries_per_kv * shape.vector_bytes, isa.constant(0)
        key = shared_key_words(isa, shape, context, vectors)
        value = shared_value_words(isa, shape, context, vectors + shape.vector_bytes)
        keys = [isa.select(context.row.equals(0), word, empty) for word in key]
        keys += [empty] * (len(key) * (LANE_KEYS - 1))
        values = [isa.select(context.column.equals(0), word, empty) for word in value]
        values += [empty] * (len(value) * (len(LANE_VALUES) - 1))
        valid = [context.column.equals(0)] + [context.column < 0] * (len(LANE_VALUES) - 1)
        return attend(isa, shape, queries, softmaxes, keys, lambda: values, [valid])

    if shares is None:
        attend_splits(isa, shape, refs, context, cache, shared, queries, attend_own, has_new_token, loaded)
    else:
        attend_shares(isa, shape, refs, shares, shared, queries, attend_own, has_new_token, loaded)


def several_tokens_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """Runs the whole program of one lane, for several new tokens that ``prepare_program`` has prepared."""
    context = lane_context(isa, shape)
    shared = isa.shared_address(refs.shared)
    (length,) = isa.load_global(isa.global_address(refs.lengths) + isa.widen(context.batch * 4), ordered=True)
    has_new_tokens = context.split.equals(shape.splits - shape.splits_per_block)
    isa.warp_barrier()
    cache = CachedPositions.create(isa, shape, refs, context, length)
    shares = Shares.create(isa, shape, context, cache) if shape.divides_shares else None
    loaded = load_first_step(isa, context, cache) if shares is None else shares.load_first()
    isa.warp_barrier()
    copy_queries(isa, shape, refs, context, shared)
    isa.block_barrier()

    def queries(octet: int) -> list[Value]:
        row = context.row if octet == 0 else context.row + OCTET * octet
        return shared_key_words(isa, shape, context, shared + row * shape.vector_bytes)

    def attend_own(softmaxes: list[OnlineSoftmax]) -> list[OnlineSoftmax]:
        """Attends to 16 positions, the new tokens. Only the row's own token is valid."""

        def load(indices: Iterator[Value], load_vector: Callable, array: Any) -> list[Value]:
            words = []
            for index in indices:
                token = smaller(isa, index, isa.constant(shape.tokens - 1))
                vector = (context.batch * shape.tokens + token) * shape.kv_heads + context.kv_head
                words += load_vector(isa, shape, context, array, vector)
            return words

        keys = load(key_indices(context), load_key, refs.new_keys)
        own = [token_of_row(isa, shape, context, octet) for octet in range(shape.octets)]
        valid = [[index.equals(token) for index in value_indices(context)] for token in own]
        softmaxes = attend(
            isa,
            shape,
            queries,
            softmaxes,
            keys,
            lambda: load(value_indices(context), load_value, refs.new_values),
            valid,
        )
        # The sum of the weights is 1. The program of one token has it in the lane of the first position.
        one, zero = isa.constant(1.0, "f32"), isa.constant(0.0, "f32")
        for softmax in softmaxes:
            softmax.running_sum = isa.select(context.column.equals(0), one, zero)
        return softmaxes

    if shares is None:
        attend_splits(isa, shape, refs, context, cache, shared, queries, attend_own, has_new_tokens, loaded)
    else:
        attend_shares(isa, shape, refs, shares, shared, queries, attend_own, has_new_tokens, loaded)


def attend_splits(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    context: LaneContext,
    cache: CachedPositions,
    shared: Value,
    queries: Queries,
    attend_own: AttendOwn,
    has_new_tokens: Value,
    loaded: Loaded,
) -> None:
    """Attends to the splits of the CTA one after another, and writes their results.

    The arguments are those of ``split.attend_split``, for the first split of the CTA, and the address of the
    shared memory.
    """
    if shape.splits_per_block == 1:
        softmaxes = attend_split(isa, shape, context, cache, queries, attend_own, has_new_tokens, loaded)
        merge_in_block(isa, shape, refs, softmaxes, context, shared)
        return

    def attend_each(index: Value, carry: list[Value]) -> list[Value]:
        """Attends to a split, merges its softmaxes, and loads the first step of the next split."""
        current = context.shifted(index)
        following = context.shifted(index + 1)
        step = first_step(isa, following, cache)
        pages = Loaded.load_pages(cache, following, step)
        has_new_tokens = current.split.equals(shape.splits - 1)
        loaded = Loaded.from_registers(shape, carry)
        softmaxes = attend_split(isa, shape, current, cache, queries, attend_own, has_new_tokens, loaded)
        loaded = Loaded.load(cache, following, step, pages)
        loaded = loaded.with_pages(Loaded.load_pages(cache, following, step, ahead=1))
        merge_in_block(isa, shape, refs, softmaxes, current, shared)
        isa.block_barrier()  # The next split writes the shared memory of this merge.
        return loaded.registers()

    isa.loop(isa.constant(shape.splits_per_block), loaded.registers(), attend_each)


def first_step(isa: Instructions, context: LaneContext, cache: CachedPositions) -> Value:
    """Returns the index of the split's first step."""
    step = cache.first_step(context)
    return isa.constant(0) if step is None else step


def load_first_step(isa: Instructions, context: LaneContext, cache: CachedPositions) -> Loaded:
    """Loads the first step of the CTA, and the pages of the second one."""
    step = first_step(isa, context, cache)
    loaded = Loaded.load(cache, context, step, Loaded.load_pages(cache, context, step))
    return loaded.with_pages(Loaded.load_pages(cache, context, step, ahead=1))


def copy_queries(isa: Instructions, shape: Shape, refs: Refs, context: LaneContext, shared: Value) -> None:
    """Copies the query rows of the CTA to shared memory. Rows that do not exist repeat the last one."""
    units = shape.key_values // 8  # of 16 bytes
    for begin in range(0, OCTET * shape.octets * units, THREADS):
        item = context.thread + begin
        row, unit = item // units, item % units
        source = row if context.first_row is None else row + context.first_row
        source = smaller(isa, source, isa.constant(shape.rows - 1))
        vector = (context.batch * shape.kv_heads + context.kv_head) * shape.rows + source
        existing = unit
        if padded := units - shape.head_dim // 8:
            existing = smaller(isa, unit, isa.constant(units - padded - 1))
        address = isa.global_address(refs.queries) + isa.widen(vector) * (2 * shape.head_dim)
        words = isa.load_global(address + isa.widen(existing * 16), 4, ordered=True)
        if padded:
            words = [isa.select(unit < units - padded, word, isa.constant(0)) for word in words]
        target = shared + row * shape.vector_bytes + unit * 16
        isa.store_shared(target, words, item < OCTET * shape.octets * units)


def shared_key_words(isa: Instructions, shape: Shape, context: LaneContext, vector: Value) -> list[Value]:
    """Loads the words of a key from a vector in shared memory, in the order of ``load_key``."""
    base = vector + context.column * 16
    return [word for t in range(shape.key_values // KEY_CHUNK) for word in isa.load_shared(base + t * 64, 4)]


def shared_value_words(isa: Instructions, shape: Shape, context: LaneContext, vector: Value) -> list[Value]:
    """Loads the words of a value from a vector in shared memory, in the order of ``load_value``."""
    base = vector + context.row * 16
    words = []
    for first in range(0, shape.head_dim, CHUNK):
        if (left := shape.head_dim - first) < CHUNK:
            base = vector + smaller(isa, context.row, isa.constant(left // 8 - 1)) * 16
        words += isa.load_shared(base + 2 * first, 4)
    return words
