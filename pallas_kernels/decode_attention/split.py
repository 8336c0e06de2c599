"""Attention of the query rows of a CTA to the cached positions of one split."""

from collections.abc import Callable

from pallas_kernels.decode_attention.cached_positions import (
    CachedPositions,
    Loaded,
    cached_position,
    positions_in_split,
    smaller,
    value_indices,
)
from pallas_kernels.decode_attention.lane_context import (
    BLOCK_POSITIONS,
    STEP_POSITIONS,
    WARPS,
    LaneContext,
    Shape,
)
from pallas_kernels.decode_attention.online_softmax import (
    OnlineSoftmax,
    Queries,
    attend,
    empty_softmaxes,
    from_registers,
    to_registers,
)
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value

AttendOwn = Callable[[list[OnlineSoftmax]], list[OnlineSoftmax]]
"""Lets each new token attend to itself."""


def attend_split(
    isa: Instructions,
    shape: Shape,
    context: LaneContext,
    cache: CachedPositions,
    queries: Queries,
    attend_own: AttendOwn,
    has_new_tokens: Value,
    loaded: Loaded,
) -> list[OnlineSoftmax]:
    """Attends to all positions of a split; returns the softmaxes of the warp.

    Args:
      isa: The instructions.
      shape: Static sizes.
      context: Indices of the lane.
      cache: The cached positions.
      queries: The lane's words of its query rows.
      attend_own: Lets each new token attend to itself.
      has_new_tokens: Whether new tokens attend to themselves in this split.
      loaded: The first step.
    """
    first_step = cache.first_step(context)

    def attend_next(index: Value, carry: list[Value]) -> list[Value]:
        """Attends to the positions of a step, whose words are in ``carry``, and loads the next words."""
        step = index if first_step is None else first_step + index
        softmaxes, rest = from_registers(carry, shape)
        words = Loaded.from_registers(shape, rest)
        softmaxes = attend_step(isa, shape, context, cache, queries, softmaxes, words, step)
        following = Loaded.load(cache, context, step + 1, words.pages)
        following = following.with_pages(Loaded.load_pages(cache, context, step, ahead=2))
        return to_registers(softmaxes) + following.registers()

    # The last warp has the fewest cached positions, so it attends to the new tokens. It does so first, while
    # its loads of the cache are in flight.
    has_new_tokens = has_new_tokens & context.warp.equals(WARPS - 1)
    softmaxes = attend_new_tokens(isa, shape, attend_own, has_new_tokens)
    # Number of cached positions of this split, and of steps in which this warp attends to its share of them.
    split_positions = positions_in_split(shape, context, cache.limit)
    first = context.warp * STEP_POSITIONS
    steps = isa.select(
        first < split_positions,
        (split_positions - first + (BLOCK_POSITIONS - 1)) // BLOCK_POSITIONS,
        isa.constant(0),
    )
    if first_step is not None:
        steps = isa.select(first_step < steps, steps - first_step, isa.constant(0))
    softmaxes, _ = from_registers(
        isa.loop(steps, to_registers(softmaxes) + loaded.registers(), attend_next), shape
    )
    return softmaxes


def attend_new_tokens(
    isa: Instructions, shape: Shape, attend_own: AttendOwn, has_new_tokens: Value
) -> list[OnlineSoftmax]:
    """Returns the softmaxes over the new tokens, or over no positions without ``has_new_tokens``."""

    def attend_new(_, carry: list[Value]) -> list[Value]:
        return to_registers(attend_own(from_registers(carry, shape)[0]))

    registers = to_registers(empty_softmaxes(isa, shape))
    count = isa.select(has_new_tokens, isa.constant(1), isa.constant(0))
    return from_registers(isa.loop(count, registers, attend_new), shape)[0]


def attend_step(
    isa: Instructions,
    shape: Shape,
    context: LaneContext,
    cache: CachedPositions,
    queries: Queries,
    softmaxes: list[OnlineSoftmax],
    words: Loaded,
    step: Value,
) -> list[OnlineSoftmax]:
    """Attends to the positions of a step, whose words are loaded."""
    value_pages = cache.load_value_pages(context, step) if shape.late_values else []

    def load_values() -> list[Value]:
        return cache.load_values(context, step, value_pages) if shape.late_values else words.values

    valid = [_valid(isa, shape, context, cache, step, octet) for octet in range(shape.octets)]
    return attend(isa, shape, queries, softmaxes, words.keys, load_values, valid)


def token_of_row(isa: Instructions, shape: Shape, context: LaneContext, octet: int) -> Value:
    """Returns the new token of the lane's query row in an octet."""
    row = context.query_row(octet)
    return smaller(isa, row, isa.constant(shape.rows - 1)) // shape.queries_per_kv


def _valid(
    isa: Instructions, shape: Shape, context: LaneContext, cache: CachedPositions, step: Value, octet: int
) -> list[Value]:
    """Returns whether the lane's query row attends to each of its positions of a step.

    A token attends to cached positions below its own, so to those of earlier new tokens, too.
    """
    own = limit = cache.limit
    if shape.tokens > 1:
        own = cache.length + token_of_row(isa, shape, context, octet)
        limit = smaller(isa, own, cache.limit)
    valid = []
    for index in value_indices(context):
        position = cached_position(shape, context, step, index)
        is_valid = position < limit
        if shape.window is not None:
            is_valid = is_valid & (position >= own - (shape.window - 1))
        valid.append(is_valid)
    return valid
