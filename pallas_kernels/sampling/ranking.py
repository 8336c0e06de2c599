"""Choice by rank: top-k with k up to ``LISTED_K``, the other filters after it, and greedy choice.

The CTA lists all keys above a lower bound of the k-th largest, usually a few more than k. A thread for each
counts and weighs those above its own, which decides what top-k and top-p keep.

The bound is the k-th largest of the maxima of ``GROUPS`` groups of chunks, but no key ``DEPTH`` nats below
the largest logit is listed: it cannot be chosen, because the noise lies between ``noise.MIN_NOISE`` and
``noise.MAX_NOISE``.
"""

from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.lanes.registers import Value
from pallas_kernels.sampling import noise
from pallas_kernels.sampling.block import THREADS, Block
from pallas_kernels.sampling.candidates import (
    LEAST_KEY,
    LISTED_K,
    NO_KEY,
    NO_TOKEN,
    SIGN,
    key_of,
    no_candidate,
    number_of,
    select_candidate,
    token_of,
)

DEPTH = 24.0
"""Distance of the lowest listed key from the largest, in nats."""

GROUPS = LISTED_K
"""Number of groups of chunks."""

TOGETHER = 4
"""Number of chunks that a warp reads together."""


def choose_by_rank(block: Block) -> tuple[Value, Value, Value]:
    """Returns the token; whether it is found, which it is unless more than ``THREADS`` keys reach the bound,
    or k is not between 1 and ``LISTED_K``; and the bound."""
    isa = block.isa
    eligible = (isa.constant(0) < block.k) & (block.k < LISTED_K + 1)
    one, zero = isa.constant(1), isa.constant(0)

    def attempt(_: Value, __: list[Value]) -> list[Value]:
        bound = _bound(block)
        count = block.listed([key >= bound for key in block.largest])

        def add(_: Value, keys: list[Value], carry: list[Value]) -> list[Value]:
            for key in keys:
                carry = [carry[0] + isa.select(key >= bound, one, zero)]
            return carry

        before, candidates = block.scan(block.over_listed(count, [zero], add, TOGETHER)[0])
        fits = isa.select(candidates < THREADS + 1, one, zero)

        def ranked(_: Value, __: list[Value]) -> list[Value]:
            _write(block, bound, count, before, candidates)
            return [_choose(block, candidates)]

        return [*isa.loop(fits, [isa.constant(NO_TOKEN)], ranked), fits, bound]

    start = [isa.constant(NO_TOKEN), zero, isa.constant(LEAST_KEY)]
    token, found, bound = isa.loop(isa.select(eligible, one, zero), start, attempt)
    return token, found.equals(1), bound


def _bound(block: Block) -> Value:
    """Returns a lower bound of the k-th largest key, or the lowest key of interest if that is higher."""
    isa, thread = block.isa, block.thread
    groups, maxima = (block.shared + offset for offset in (block.layout.groups, block.layout.maxima))
    with isa.when(thread < GROUPS):
        (group,) = isa.load_shared(maxima + (thread << 2))
        for first in range(GROUPS, THREADS, GROUPS):
            (key,) = isa.load_shared(maxima + ((thread + first) << 2))
            group = isa.select(group < key, key, group)
        isa.store_shared(groups + (thread << 2), [group])
    isa.block_barrier()
    leasts = groups + 4 * GROUPS
    with isa.when(thread < GROUPS):
        (group,) = isa.load_shared(groups + (thread << 2))

        def count(i: Value, larger: list[Value]) -> list[Value]:
            for j in range(4):
                for key in isa.load_shared(groups + (i << 6) + 16 * j, 4):
                    larger = [larger[0] + isa.select(group < key, isa.constant(1), isa.constant(0))]
            return larger

        (larger,) = isa.loop(isa.constant(GROUPS // 16), [isa.constant(0)], count)
        # The minimum, as the complement of a maximum of unsigned numbers.
        complement = isa.select(larger < block.k, (group ^ SIGN) ^ -1, isa.constant(0))
        least = (isa.reduce_max(complement) ^ -1) ^ SIGN
        isa.store_shared(leasts + (block.warp << 2), [least], where=block.lane.equals(0))
    isa.block_barrier()
    assert GROUPS == 4 * LANES
    bound, *others = isa.load_shared(leasts, 4)
    for least in others:
        bound = isa.select(least < bound, least, bound)
    isa.block_barrier()
    lowest = key_of(isa, number_of(isa, block.top) - DEPTH)
    return isa.select(bound < lowest, lowest, bound)


def _write(block: Block, bound: Value, count: Value, before: Value, candidates: Value) -> None:
    """Writes the keys of the listed chunks that reach the bound, and the indices of their logits."""
    isa = block.isa
    keys, indices = block.shared + block.layout.keys, block.shared + block.layout.indices

    def write(index: Value, lane_keys: list[Value], carry: list[Value]) -> list[Value]:
        (place,) = carry
        for e, key in enumerate(lane_keys):
            reaches = key >= bound
            isa.store_shared(keys + (place << 2), [key], where=reaches)
            isa.store_shared(indices + (place << 2), [index + e * LANES], where=reaches)
            place = place + isa.select(reaches, isa.constant(1), isa.constant(0))
        return [place]

    block.over_listed(count, [before], write, TOGETHER // 2)  # These loads hit the L1 cache.
    missing = block.thread >= candidates
    isa.store_shared(keys + (block.thread << 2), [isa.constant(NO_KEY)], where=missing)
    isa.block_barrier()


def _choose(block: Block, candidates: Value) -> Value:
    """Returns the token with the highest score among those of the candidates that the filters keep."""
    isa, inputs, layout, thread = block.isa, block.refs.inputs, block.layout, block.thread
    zero, none = isa.constant(0), isa.constant(0.0, "f32")
    exists = thread < candidates
    (key,) = isa.load_shared(block.shared + layout.keys + (thread << 2))
    weight = isa.select(exists, block.weight(key), none)
    isa.store_shared(block.shared + layout.weights + (thread << 2), [isa.float_to_bits(weight)])
    busy = (block.warp << 5) < candidates

    def score(_: Value, __: list[Value]) -> list[Value]:
        (index,) = isa.load_shared(block.shared + layout.indices + (isa.select(exists, thread, zero) << 2))
        token = token_of(isa, block.shape, inputs, index)
        added = noise.gumbel(isa, block.noise_key(), token)
        return [number_of(isa, key) + isa.select(block.sampled, added, none), token]

    def rank(i: Value, carry: list[Value]) -> list[Value]:
        larger, above = carry
        keys = isa.load_shared(block.shared + layout.keys + (i << 4), 4)
        weights = isa.load_shared(block.shared + layout.weights + (i << 4), 4, "f32")
        for other, other_weight in zip(keys, weights, strict=True):
            larger = larger + isa.select(key < other, isa.constant(1), zero)
            above = above + isa.select(key < other, other_weight, none)
        return [larger, above]

    once = isa.select(busy, isa.constant(1), zero)
    number, token = isa.loop(once, [none, isa.constant(NO_TOKEN)], score)
    isa.block_barrier()
    larger, above = isa.loop(isa.select(busy, (candidates + 3) >> 2, zero), [zero, none], rank)
    by_k = exists & (larger < block.k)
    (total,) = block.sums([isa.select(by_k, weight, none)])
    kept = by_k & block.within_share(above, total) & (key >= block.least)
    return block.best(select_candidate(isa, kept, (number, token, key), no_candidate(isa)))[1]
