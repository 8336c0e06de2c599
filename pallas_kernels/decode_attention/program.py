"""The lane program of decode attention: one launch reads the cache once.

    partial sums of qkv ──► sum, norm of each query and key head, rotation ──► shared memory
                                       └──► the cache, at the new token's slot          │
    cache ──► scores ◄────────── queries, new key, new value ◄──────────────────────────┘
                └──► online softmax and weighted values ──► partial result of the CTA

A CTA computes one key-value head with its query heads. A split is every ``splits``-th cached position, so the
work is balanced at every length; a CTA attends to one split, or to several one after another. The first loads
of the cache wait only for the length. Each warp attends to 16 positions in one step and has a separate online
softmax: running max, running sum and accumulator. At the end of a split the CTA merges the softmaxes of its
warps. A second launch, ``merging.merge_program``, merges the softmaxes of the splits.

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

import math

from pallas_kernels.decode_attention.cached_positions import (
    LANE_KEYS,
    LANE_VALUES,
    CachedPositions,
    cached_position,
)
from pallas_kernels.decode_attention.lane_context import (
    BLOCK_POSITIONS,
    CHUNK,
    MASKED_SCORE,
    STEP_POSITIONS,
    WARPS,
    LaneContext,
    OnlineSoftmax,
    Refs,
    Shape,
    lane_context,
)
from pallas_kernels.decode_attention.merging import larger, merge_in_block
from pallas_kernels.decode_attention.new_token import fetch, prepare
from pallas_kernels.lanes.instructions import Instructions, Value


def attention_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    context = lane_context(isa, shape)
    shared = isa.shared_address(refs.shared)
    (length,) = isa.load_global(isa.global_address(refs.lengths) + isa.widen(context.batch * 4), ordered=True)
    # The last split has the fewest cached positions, so it attends to the new token.
    has_new_token = context.split.equals(shape.splits - shape.splits_per_block)
    # Each warp prepares one head, or, with more than 6 query heads for a key, some warps prepare two.
    vectors = [context.warp] + [context.warp + WARPS * i for i in range(1, -(-shape.vectors // WARPS))]
    # The barriers keep the compiler from delaying or reordering these loads. They cost nothing.
    fetched = [fetch(isa, shape, refs, context, has_new_token, vector) for vector in vectors]
    isa.warp_barrier()
    cache, step = CachedPositions.create(isa, shape, refs, context, length), isa.constant(0)
    words = cache.load(context, step, cache.load_pages(context, step))
    following = cache.load_pages(context, step, ahead=1)
    isa.warp_barrier()
    for values in fetched:
        prepare(isa, shape, refs, context, values, shared, length, has_new_token)
    isa.block_barrier()
    head = isa.select(context.row < shape.queries_per_kv, context.row, isa.constant(shape.queries_per_kv - 1))
    queries = shared_key_words(isa, shape, context, shared + head * shape.vector_bytes)
    if shape.splits_per_block == 1:
        state = attend_split(isa, shape, context, cache, queries, shared, has_new_token, words + following)
        merge_in_block(isa, shape, refs, state, context, shared)
        return

    def attend_each(index: Value, carry: list[Value]) -> list[Value]:
        """Attends to a split, merges its softmaxes, and loads the first step of the next split."""
        current = context.shifted(index)
        following = context.shifted(index + 1)
        pages = cache.load_pages(following, step)
        has_new_token = current.split.equals(shape.splits - 1)
        state = attend_split(isa, shape, current, cache, queries, shared, has_new_token, carry)
        words = cache.load(following, step, pages)
        pages = cache.load_pages(following, step, ahead=1)
        merge_in_block(isa, shape, refs, state, current, shared)
        isa.block_barrier()  # The next split writes the shared memory of this merge.
        return words + pages

    isa.loop(isa.constant(shape.splits_per_block), words + following, attend_each)


def attend_split(
    isa: Instructions,
    shape: Shape,
    context: LaneContext,
    cache: CachedPositions,
    queries: list[Value],
    shared: Value,
    has_new_token: Value,
    loaded: list[Value],
) -> OnlineSoftmax:
    """Attends to all positions of a split; returns the softmax of the warp.

    Args:
      isa: The instructions.
      shape: Static sizes.
      context: Indices of the lane.
      cache: The cached positions.
      queries: The lane's words of its query head.
      shared: Address of the shared memory.
      has_new_token: Whether the split attends to the new token.
      loaded: Words of the first step, then pages of the second one.
    """
    length = cache.length

    def attend_new(_, carry: list[Value]) -> list[Value]:
        """Attends to 16 positions of which only the first is valid: the new token."""
        vectors, empty = shared + shape.queries_per_kv * shape.vector_bytes, isa.constant(0)
        key = shared_key_words(isa, shape, context, vectors)
        value = shared_value_words(isa, shape, context, vectors + shape.vector_bytes)
        words = [isa.select(context.row.equals(0), word, empty) for word in key]
        words += [empty] * (len(key) * (LANE_KEYS - 1))
        words += [isa.select(context.column.equals(0), word, empty) for word in value]
        words += [empty] * (len(value) * (len(LANE_VALUES) - 1))
        valid = [context.column.equals(0)] + [context.column < 0] * (len(LANE_VALUES) - 1)
        state, _ = OnlineSoftmax.from_registers(carry, shape.head_dim)
        return attend(isa, shape, queries, state, words, valid).registers()

    def attend_next(step: Value, carry: list[Value]) -> list[Value]:
        """Attends to the positions of a step, whose words are in ``carry``, and loads the next words."""
        state, rest = OnlineSoftmax.from_registers(carry, shape.head_dim)
        words, pages = rest[: shape.step_words], rest[shape.step_words :]
        valid = [cached_position(shape, context, step, context.column * 2 + v) < length for v in LANE_VALUES]
        state = attend(isa, shape, queries, state, words, valid)
        words = cache.load(context, step + 1, pages)
        return state.registers() + words + cache.load_pages(context, step, ahead=2)

    zero = isa.constant(0.0, "f32")
    state = OnlineSoftmax(isa.constant(MASKED_SCORE, "f32"), zero, [zero] * (shape.head_dim // 4))
    # The last warp has the fewest cached positions, so it attends to the new token. It does so first, while
    # its loads of the cache are in flight.
    new_tokens = isa.select(has_new_token & context.warp.equals(WARPS - 1), isa.constant(1), isa.constant(0))
    state, _ = OnlineSoftmax.from_registers(
        isa.loop(new_tokens, state.registers(), attend_new), shape.head_dim
    )
    # Number of cached positions of this split, and of steps in which this warp attends to its share of them.
    split_positions = (length + (shape.splits - 1) - context.split) // shape.splits
    first = context.warp * STEP_POSITIONS
    steps = isa.select(
        first < split_positions,
        (split_positions - first + (BLOCK_POSITIONS - 1)) // BLOCK_POSITIONS,
        isa.constant(0),
    )
    state, _ = OnlineSoftmax.from_registers(
        isa.loop(steps, state.registers() + loaded, attend_next), shape.head_dim
    )
    return state


def attend(
    isa: Instructions,
    shape: Shape,
    queries: list[Value],
    state: OnlineSoftmax,
    words: list[Value],
    valid: list[Value],
) -> OnlineSoftmax:
    """Attends to 16 positions and returns the new softmax.

    Args:
      isa: The instructions.
      shape: Static sizes.
      queries: The lane's words of its query head.
      state: Softmax over the previous positions.
      words: The lane's words of its ``LANE_KEYS`` keys, then of the values at its ``LANE_VALUES`` positions.
      valid: Whether each of the ``LANE_VALUES`` positions exists.
    """
    zero, empty = isa.constant(0.0, "f32"), isa.constant(0)
    words_per_key, words_per_value = shape.head_dim // 8, shape.head_dim // 16
    keys = [words[k * words_per_key : (k + 1) * words_per_key] for k in range(LANE_KEYS)]
    words = words[LANE_KEYS * words_per_key :]
    values = [words[v * words_per_value : (v + 1) * words_per_value] for v in range(len(LANE_VALUES))]
    scores = []
    for key in keys:
        sums = [zero] * 4
        for i in range(0, words_per_key, 2):
            heads = [queries[i], empty, queries[i + 1], empty]  # Rows from 8 on do not exist.
            sums = isa.matrix_multiply_add_bfloat16(sums, heads, key[i : i + 2])
        scores += sums[:2]
    unit = math.log2(math.e) / math.sqrt(shape.head_dim)
    masked = isa.constant(MASKED_SCORE, "f32")
    scores = [isa.select(ok, score * unit, masked) for ok, score in zip(valid, scores, strict=True)]
    running_max = state.running_max
    for score in scores:
        running_max = larger(isa, running_max, score)
    for distance in (1, 2):
        running_max = larger(isa, running_max, isa.shuffle_xor(running_max, distance))
    factor = isa.exp2(state.running_max - running_max)
    weights = [isa.select(ok, isa.exp2(s - running_max), zero) for ok, s in zip(valid, scores, strict=True)]
    running_sum = state.running_sum * factor
    for weight in weights:
        running_sum = running_sum + weight
    heads = [isa.pack_bfloat16(*weights[:2]), empty, isa.pack_bfloat16(*weights[2:]), empty]
    accumulator = []
    for block in range(shape.head_dim // 8):
        word, selector = block // 2, (0x5410, 0x7632)[block % 2]
        pairs = [isa.permute_bytes(values[v][word], values[v + 1][word], selector) for v in (0, 2)]
        sums = [a * factor for a in state.accumulator[2 * block : 2 * block + 2]] + [zero, zero]
        accumulator += isa.matrix_multiply_add_bfloat16(sums, heads, pairs)[:2]
    return OnlineSoftmax(running_max, running_sum, accumulator)


def shared_key_words(isa: Instructions, shape: Shape, context: LaneContext, vector: Value) -> list[Value]:
    """Loads the words of a key from a vector in shared memory, in the order of ``CachedPositions``."""
    base = vector + context.column * 16
    return [word for t in range(shape.head_dim // 32) for word in isa.load_shared(base + t * 64, 4)]


def shared_value_words(isa: Instructions, shape: Shape, context: LaneContext, vector: Value) -> list[Value]:
    """Loads the words of a value from a vector in shared memory, in the order of ``CachedPositions``."""
    base = vector + context.row * 16
    return [
        word
        for chunk in range(shape.head_dim // CHUNK)
        for word in isa.load_shared(base + chunk * 2 * CHUNK, 4)
    ]
