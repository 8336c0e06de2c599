"""Choice by rejection: every row that ``ranking`` does not choose for, so top-p and min-p without top-k.

The token with the highest score of all, noise included, is the choice if the filters keep it. Otherwise every
token with the same key or a lower one is rejected as well, and the best of the others is the next candidate.
So nothing is sorted, and the cutoff is not needed: only the number and the weights of the keys above that of
the candidate. Top-p after top-k also needs the sum of what top-k keeps, so a search finds the k-th largest
key first, two bits at a time.

A candidate is kept with the probability that the filters keep, so most rows take one or two rounds. On
average a rejection leaves half of the probability that the filters do not keep, so the number of rounds is
about ``1 + ln(1 / kept)``, 13 if one of 151,936 equal tokens is kept. ``ROUNDS`` is never reached.

A chunk whose best candidate is rejected is scored again, but only if the score of that candidate, which is an
upper bound for the chunk, is at least that of the best candidate that is not rejected.
"""

from collections.abc import Callable

from pallas_kernels.lanes.instructions import LANES
from pallas_kernels.lanes.registers import Value
from pallas_kernels.sampling import noise
from pallas_kernels.sampling.block import Block
from pallas_kernels.sampling.candidates import (
    LEAST_KEY,
    NO_KEY,
    NO_TOKEN,
    SIGN,
    Candidate,
    better,
    no_candidate,
    number_of,
    select_candidate,
    token_of,
)

ROUNDS = 64
"""Largest number of rounds."""

PIVOTS = 3
"""Number of keys that a pass of the search compares with: it finds two bits."""

TOGETHER = 8
"""Number of chunks that a warp reads together."""


def choose_by_rejection(block: Block, bound: Value) -> Value:
    """Returns the token.

    Args:
      block: The lane.
      bound: Lower bound of the k-th largest key, if top-k filters the row.
    """
    isa = block.isa
    zero, one = isa.constant(0), isa.constant(1)
    by_k = (zero < block.k) & (block.k < block.shape.vocabulary)
    start = isa.select(by_k, bound, isa.constant(LEAST_KEY))
    kth = _kth_key(block, start, by_k & block.by_p)
    floor = isa.select(kth < block.least, block.least, kth)
    none, k = isa.constant(0.0, "f32"), isa.int_to_float(block.k)

    def total_of_kept(_: Value, __: list[Value]) -> list[Value]:
        return [_total(block, kth, by_k)]

    (total,) = isa.loop(isa.select(block.by_p, one, zero), [none], total_of_kept)
    checked = isa.select(block.by_p | by_k, one, zero)

    def attempt(_: Value, carry: list[Value]) -> list[Value]:
        _, token, key = _best(block, carry[0])

        def above_candidate(_: Value, __: list[Value]) -> list[Value]:
            above = block.listed([key < largest for largest in block.largest])
            return block.sums(_sums(block, above, lambda other: key < other))

        above, larger = isa.loop(checked, [none, none], above_candidate)
        kept = block.within_share(above, total) & (~by_k | (larger < k))
        return [key + 1, token, isa.select(kept, one, zero)]

    def round_(_: Value, carry: list[Value]) -> list[Value]:
        return isa.loop(isa.constant(1) - carry[2], carry, attempt)

    rounds = isa.select(checked.equals(1), isa.constant(ROUNDS), one)
    return isa.loop(rounds, [floor, isa.constant(NO_TOKEN), zero], round_)[1]


def _kth_key(block: Block, start: Value, wanted: Value) -> Value:
    """Returns the largest key that at least k keys reach; ``start`` if none above it, or if not wanted."""
    isa = block.isa
    distance = block.top - start
    exponent = (isa.float_to_bits(isa.int_to_float(distance)) >> 23) - 126
    bits = isa.select(distance < 0, isa.constant(32), exponent)  # The distance is unsigned.
    passes = isa.select(wanted & ~distance.equals(0), (bits + 1) >> 1, isa.constant(0))
    count = block.listed([wanted & (key >= start) for key in block.largest])
    k, zero, one = isa.int_to_float(block.k), isa.constant(0.0, "f32"), isa.constant(1.0, "f32")

    def narrow(i: Value, carry: list[Value]) -> list[Value]:
        (offset,) = carry
        shift = (passes - 1 - i) << 1
        pivots = [(offset + (isa.constant(d) << shift)) ^ SIGN for d in range(1, PIVOTS + 1)]

        def add(_: Value, keys: list[Value], sums: list[Value]) -> list[Value]:
            for key in keys:
                above = isa.select(key < start, isa.constant(0), key - start) ^ SIGN
                sums = [
                    total + isa.select(above >= pivot, one, zero)
                    for total, pivot in zip(sums, pivots, strict=True)
                ]
            return sums

        digit = isa.constant(0)
        for reached in block.sums(block.over_listed(count, [zero] * PIVOTS, add, TOGETHER)):
            digit = digit + isa.select(reached >= k, isa.constant(1), isa.constant(0))
        return [offset + (digit << shift)]

    return start + isa.loop(passes, [isa.constant(0)], narrow)[0]


def _sums(block: Block, count: Value, member: Callable[[Value], Value]) -> list[Value]:
    """Returns the sum of weights and the number of the members among the lane's keys of the listed chunks."""
    isa = block.isa
    zero, one = isa.constant(0.0, "f32"), isa.constant(1.0, "f32")

    def add(_: Value, keys: list[Value], carry: list[Value]) -> list[Value]:
        weights, number = carry
        for key in keys:
            weights = weights + isa.select(member(key), block.weight(key), zero)
            number = number + isa.select(member(key), one, zero)
        return [weights, number]

    return block.over_listed(count, [zero, zero], add, TOGETHER)


def _total(block: Block, kth: Value, by_k: Value) -> Value:
    """Returns the sum of the weights of all tokens that top-k keeps."""
    isa, zero = block.isa, block.isa.constant(0.0, "f32")
    count = block.listed([by_k & (key >= kth) for key in block.largest])
    total = _sums(block, count, lambda key: key >= kth)[0]
    for key, word in zip(block.largest, block.statistic(1, 0), strict=True):
        weight = block.weight(key) * isa.bits_to_float(word)
        total = total + isa.select(by_k | key.equals(NO_KEY), zero, weight)
    return block.sums([total])[0]


def _best(block: Block, floor: Value) -> Candidate:
    """Returns the candidate with the highest score among those with at least the key ``floor``."""
    isa = block.isa
    best = no_candidate(isa)
    for candidate in block.scored:
        best = select_candidate(isa, candidate[2] >= floor, better(isa, candidate, best), best)
    best = block.best(best)

    def score_again(_: Value, carry: list[Value]) -> list[Value]:
        best = carry[0], carry[1], carry[2]
        unknown = [
            (largest >= floor) & ~(key >= floor) & ~(score < best[0])
            for largest, (score, _, key) in zip(block.largest, block.scored, strict=True)
        ]
        return list(block.best(_scored(block, block.listed(unknown), floor, best)))

    filtered = isa.select(isa.constant(LEAST_KEY) < floor, isa.constant(1), isa.constant(0))
    score, token, key = isa.loop(filtered, list(best), score_again)
    return score, token, key


def _scored(block: Block, count: Value, floor: Value, best: Candidate) -> Candidate:
    """Returns the best of ``best`` and the lane's tokens of the listed chunks with at least the key
    ``floor``."""
    isa = block.isa
    noise_key = block.noise_key()

    def visit(index: Value, keys: list[Value], carry: list[Value]) -> list[Value]:
        some = isa.constant(0)
        for key in keys:
            some = some | isa.select(key >= floor, isa.constant(1), isa.constant(0))

        def score(_: Value, carry: list[Value]) -> list[Value]:
            best = carry[0], carry[1], carry[2]
            for e, key in enumerate(keys):
                kept = key >= floor
                place = isa.select(kept, index + e * LANES, isa.constant(0))
                token = token_of(isa, block.shape, block.refs.inputs, place)
                added = noise.gumbel(isa, noise_key, token)
                number = number_of(isa, key) + isa.select(block.sampled, added, isa.constant(0.0, "f32"))
                best = select_candidate(isa, kept, better(isa, (number, token, key), best), best)
            return list(best)

        return isa.loop(isa.reduce_max(some), carry, score)

    score, token, key = block.over_listed(count, list(best), visit, 1)
    return score, token, key
