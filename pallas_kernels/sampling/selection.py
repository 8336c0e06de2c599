"""The second launch of sampling: finds the smallest logit that the filters keep, and the best kept token.

A CTA has a row. Keys are scaled logits as integers in the order of the numbers. Both filters keep the keys
that reach a cutoff. For top-k it is the largest key that at least k keys reach; for top-p, the largest key
such that the keys that reach it have a share of ``top_p``. A search finds it two bits at a time.

The search reads only chunks whose largest key reaches a lower bound of the cutoff. For top-k the bound is the
k-th largest of the chunks' largest keys, so about k chunks are read. For top-p alone the bound is 3, 6, 12 or
24 nats below the largest logit, the first such that the logits above it have the share. No token 24 nats
below the largest logit can be chosen, because the noise lies between ``noise.MIN_NOISE`` and
``noise.MAX_NOISE``.

The best candidate of a chunk from the first launch counts if the filters keep it. Chunks with kept tokens
whose best candidate is not kept, or not known, are scored here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.sampling import noise
from pallas_kernels.sampling.candidates import (
    CHUNK,
    CHUNK_LOADS,
    NO_KEY,
    SIGN,
    STATISTICS,
    Candidate,
    Inputs,
    Shape,
    best_of_warp,
    better,
    key_of,
    load,
    no_candidate,
    number_of,
    select_candidate,
    token_of,
    warp_max_key,
)
from pallas_kernels.sampling.scoring import LOG2_E

THREADS = 512
WARPS = THREADS // LANES

PIVOTS = 3
"""Number of keys that a pass of the search compares with: it finds two bits."""

FIRST_DEPTH = 3.0
DEPTHS = 4
DEPTH = FIRST_DEPTH * 2 ** (DEPTHS - 1)
"""Lower bounds for top-p alone, in nats below the largest logit: ``FIRST_DEPTH``, doubled up to ``DEPTH``."""

SUM_BYTES = 16
"""Bytes of shared memory in which a warp exchanges sums: up to four words."""

Sums = Callable[[Callable[[Value], list[Value]]], list[Value]]
"""Function that adds up weights over keys: its argument tells for a key to which sums it belongs."""


def registers(shape: Shape) -> int:
    """Returns the number of chunks of a thread."""
    return -(-shape.chunks // THREADS)


def shared_bytes(shape: Shape) -> int:
    """Returns the bytes of shared memory of a CTA: sums, and a list of chunks for each warp."""
    return WARPS * (SUM_BYTES + 4 * LANES * registers(shape))


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays of the launch.

    Attributes:
      inputs: See ``Inputs``.
      keys, statistics: Outputs of the first launch (see ``scoring.Refs``).
      chosen: Output, int32 ``[rows]``: the chosen tokens.
      shared: The shared memory.
    """

    inputs: Inputs
    keys: Any
    statistics: Any
    chosen: Any
    shared: Any


def selection_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    selection = Selection(isa, shape, refs)
    token = selection.best(selection.cutoff())
    with isa.when(isa.thread_index().equals(0)):
        isa.store_global(isa.global_address(refs.chosen) + isa.widen(selection.row << 2), [token])


class Selection:
    """The state of a lane.

    Neighbouring chunks belong to different warps, because likely tokens may be neighbours. A warp reads the
    listed ones of its chunks.

    Attributes:
      row: The row.
      chunks: The lane's chunks; a chunk after the last one has the largest key ``NO_KEY``.
      largest: Largest key of each of them.
      top: Largest key of the row.
    """

    def __init__(self, isa: Instructions, shape: Shape, refs: Refs):
        self.isa, self.shape, self.refs = isa, shape, refs
        thread = isa.thread_index()
        self.row, self._lane, self._warp = isa.block_index(), thread & (LANES - 1), thread >> 5
        self._sums = isa.shared_address(refs.shared)
        self._list = self._sums + WARPS * SUM_BYTES + self._warp * (4 * LANES * registers(shape))
        self.chunks = [self._lane * WARPS + self._warp + r * THREADS for r in range(registers(shape))]
        self._exists = [chunk < shape.chunks for chunk in self.chunks]
        self.largest = [
            isa.select(exists, self._statistic(0, r), isa.constant(NO_KEY))
            for r, exists in enumerate(self._exists)
        ]
        top = self.largest[0]
        for key in self.largest[1:]:
            top = isa.select(top < key, key, top)
        self.top = self._block_max_key(warp_max_key(isa, top))

    # --- the filters -----------------------------------------------------------------------------
    def cutoff(self) -> Value:
        """Returns the smallest key that the filters keep; if the row is greedy, the largest key."""
        isa, inputs = self.isa, self.refs.inputs
        off = isa.constant(0)
        sampled = isa.constant(0.0, "f32") < load(isa, inputs.temperature, self.row, "f32")
        k = isa.select(sampled, load(isa, inputs.top_k, self.row), off)
        p = load(isa, inputs.top_p, self.row, "f32")
        by_k, by_p = off < k, sampled & (p < 1.0)
        floor = key_of(isa, number_of(isa, self.top) - DEPTH)
        wanted = isa.int_to_float(k)
        bound = self._search(floor, by_k, wanted, self._over_largest)
        total = self._total()
        bound = self._deepened(bound, by_p & ~by_k, total * p)
        count = self._listed([key >= bound for key in self.largest])
        kth = self._search(bound, by_k, wanted, lambda member: self._over_list(count, member, False))
        (kept,) = self._over_list(isa.select(by_k & by_p, count, off), lambda key: [key >= kth], True)
        share = isa.select(by_k, kept, total) * p
        cutoff = self._search(kth, by_p, share, lambda member: self._over_list(count, member, True))
        min_p = load(isa, inputs.min_p, self.row, "f32")
        tiny = isa.constant(noise.TINY, "f32")
        least = number_of(isa, self.top) + noise.log(isa, isa.select(min_p < noise.TINY, tiny, min_p))
        least = isa.select(min_p < noise.TINY, cutoff, key_of(isa, least))
        cutoff = isa.select(cutoff < least, least, cutoff)
        return isa.select(sampled, cutoff, self.top)

    def _total(self) -> Value:
        """Returns the sum of the weights of all tokens."""
        isa, total = self.isa, self.isa.constant(0.0, "f32")
        for r, key in enumerate(self.largest):
            weight = self._weight(key) * isa.bits_to_float(self._statistic(1, r))
            total = total + isa.select(key.equals(NO_KEY), isa.constant(0.0, "f32"), weight)
        return self._block_sums([total])[0]

    def _deepened(self, floor: Value, wanted: Value, share: Value) -> Value:
        """Returns the bound for top-p alone: the highest from which on the weights reach ``share``, or
        ``floor``."""
        isa = self.isa

        def deepen(_, carry):
            bound, found, depth = carry
            candidate = key_of(isa, number_of(isa, self.top) - depth)
            count = self._listed([key >= candidate for key in self.largest])
            (reached,) = self._over_list(count, lambda key: [key >= candidate], True)
            enough = isa.select(reached >= share, isa.constant(1), isa.constant(0))
            bound = isa.select(enough < 1, bound, isa.select(found.equals(0), candidate, bound))
            return [bound, found | enough, depth * 2.0]

        trips = isa.select(wanted, isa.constant(DEPTHS), isa.constant(0))
        carry = [floor, isa.constant(0), isa.constant(FIRST_DEPTH, "f32")]
        return isa.loop(trips, carry, deepen)[0]

    def _search(self, start: Value, wanted: Value, target: Value, over: Sums) -> Value:
        """Returns the largest key such that the keys that reach it add up to ``target`` or more.

        Args:
          start: Lower bound, which is returned if no key above it has the sum, or if ``wanted`` is false.
          wanted: Whether to search.
          target: The sum.
          over: Adds up the keys.
        """
        isa = self.isa
        distance = self.top - start
        exponent = (isa.float_to_bits(isa.int_to_float(distance)) >> 23) - 126
        bits = isa.select(distance < 0, isa.constant(32), exponent)  # The distance is unsigned.
        passes = isa.select(wanted & ~distance.equals(0), (bits + 1) >> 1, isa.constant(0))

        def narrow(i, carry):
            (offset,) = carry
            shift = (passes - 1 - i) << 1
            pivots = [(offset + (isa.constant(d) << shift)) ^ SIGN for d in range(1, PIVOTS + 1)]

            def member(key: Value) -> list[Value]:
                above = isa.select(key < start, isa.constant(0), key - start) ^ SIGN
                return [above >= pivot for pivot in pivots]

            digit = isa.constant(0)
            for reached in over(member):
                digit = digit + isa.select(reached >= target, isa.constant(1), isa.constant(0))
            return [offset + (digit << shift)]

        return start + isa.loop(passes, [isa.constant(0)], narrow)[0]

    # --- the choice ------------------------------------------------------------------------------
    def best(self, cutoff: Value) -> Value:
        """Returns the token with the highest score among those with at least the key ``cutoff``."""
        isa, inputs = self.isa, self.refs.inputs
        best, unknown = no_candidate(isa), []
        for r, largest in enumerate(self.largest):
            score, token, key = (self._statistic(i, r) for i in (2, 3, 4))
            valid = self._exists[r] & (key >= cutoff)
            candidate = isa.bits_to_float(score), token, key
            best = select_candidate(isa, valid, better(isa, candidate, best), best)
            unknown.append((largest >= cutoff) & ~valid)
        count = self._listed(unknown)
        sampled = isa.constant(0.0, "f32") < load(isa, inputs.temperature, self.row, "f32")
        key_words = noise.row_key(isa, load(isa, inputs.seed, self.row), load(isa, inputs.position, self.row))

        def visit(i: Value, carry: list[Value]) -> list[Value]:
            (chunk,) = isa.load_shared(self._list + ((i >> 2) << 2))
            place = (i & 3) * LANES + self._lane
            key = load(isa, self.refs.keys, (self.row * self.shape.chunks + chunk) * CHUNK + place)
            kept = key >= cutoff
            some = isa.select(isa.ballot(kept).equals(0), isa.constant(0), isa.constant(1))

            def add_noise(_: Value, carry: list[Value]) -> list[Value]:
                index = isa.select(kept, chunk * CHUNK + place, isa.constant(0))
                token = token_of(isa, self.shape, inputs, index)
                added = noise.gumbel(isa, key_words, token)
                number = number_of(isa, key) + isa.select(sampled, added, isa.constant(0.0, "f32"))
                former = carry[0], carry[1], carry[2]
                new = better(isa, (number, token, key), former)
                return list(select_candidate(isa, kept, new, former))

            return isa.loop(some, carry, add_noise)

        number, token, key = isa.loop(count * CHUNK_LOADS, list(best), visit)
        return self._best_of_block(best_of_warp(isa, (number, token, key)))

    def _best_of_block(self, candidate: Candidate) -> Value:
        """Returns the token of the best of the warps' candidates."""
        isa = self.isa
        score, token, key = candidate
        isa.block_barrier()
        words = [isa.float_to_bits(score), token, key, key]
        isa.store_shared(self._sums + self._warp * SUM_BYTES, words, where=self._lane.equals(0))
        isa.block_barrier()
        score, token, key, _ = isa.load_shared(self._sums + (self._lane & (WARPS - 1)) * SUM_BYTES, 4)
        return best_of_warp(isa, (isa.bits_to_float(score), token, key))[1]

    # --- chunks ----------------------------------------------------------------------------------
    def _statistic(self, i: int, r: int) -> Value:
        """Returns statistic ``i`` of the lane's chunk ``r``; that of chunk 0 if it does not exist."""
        isa = self.isa
        chunk = isa.select(self._exists[r], self.chunks[r], isa.constant(0))
        return load(isa, self.refs.statistics, (self.row * STATISTICS + i) * self.shape.chunks + chunk)

    def _listed(self, conditions: Sequence[Value]) -> Value:
        """Lists the warp's chunks with a condition in shared memory; returns their number."""
        isa, count = self.isa, self.isa.constant(0)
        isa.warp_barrier()
        for chunk, condition in zip(self.chunks, conditions, strict=True):
            word = isa.ballot(condition)
            place = count + isa.count_bits(word & isa.lower_lanes())
            isa.store_shared(self._list + (place << 2), [chunk], where=condition)
            count = count + isa.count_bits(word)
        isa.warp_barrier()
        return isa.reduce_max(count)

    def _over_largest(self, member: Callable[[Value], list[Value]]) -> list[Value]:
        """Counts the largest keys of all chunks that belong to each sum."""
        sums = [self.isa.constant(0.0, "f32")] * PIVOTS
        for key in self.largest:
            sums = self._added(sums, member(key), self.isa.constant(1.0, "f32"))
        return self._block_sums(sums)

    def _over_list(self, count: Value, member: Callable[[Value], list[Value]], weighted: bool) -> list[Value]:
        """Adds up the weights of the keys of all listed chunks, or counts the keys."""
        isa = self.isa
        width = len(member(isa.constant(0)))

        def add(i, sums):
            (chunk,) = isa.load_shared(self._list + (i << 2))
            first = (self.row * self.shape.chunks + chunk) * CHUNK + self._lane
            for e in range(CHUNK_LOADS):
                key = load(isa, self.refs.keys, first + e * LANES)
                weight = self._weight(key) if weighted else isa.constant(1.0, "f32")
                sums = self._added(sums, member(key), weight)
            return sums

        return self._block_sums(isa.loop(count, [isa.constant(0.0, "f32")] * width, add))

    def _added(self, sums: Sequence[Value], members: Sequence[Value], weight: Value) -> list[Value]:
        zero = self.isa.constant(0.0, "f32")
        return [total + self.isa.select(m, weight, zero) for total, m in zip(sums, members, strict=True)]

    def _weight(self, key: Value) -> Value:
        """Returns the probability of a key relative to that of the largest."""
        isa = self.isa
        return isa.exp2((number_of(isa, key) - number_of(isa, self.top)) * LOG2_E)

    # --- the CTA ---------------------------------------------------------------------------------
    def _block_sums(self, sums: Sequence[Value]) -> list[Value]:
        """Adds up numbers over the CTA, in a fixed order; every lane gets the totals."""
        isa, totals = self.isa, list(sums)
        for distance in (1, 2, 4, 8, 16):
            totals = [total + isa.shuffle_xor(total, distance) for total in totals]
        words = [isa.float_to_bits(total) for total in totals]
        words += [isa.constant(0)] * (4 - len(words))
        isa.store_shared(self._sums + self._warp * SUM_BYTES, words, where=self._lane.equals(0))
        isa.block_barrier()
        loaded = isa.load_shared(self._sums + (self._lane & (WARPS - 1)) * SUM_BYTES, 4, "f32")
        for distance in (1, 2, 4, 8):
            loaded = [total + isa.shuffle_xor(total, distance) for total in loaded]
        isa.block_barrier()
        return loaded[: len(totals)]

    def _block_max_key(self, key: Value) -> Value:
        """Returns the largest of the warps' keys."""
        isa = self.isa
        isa.store_shared(self._sums + self._warp * SUM_BYTES, [key], where=self._lane.equals(0))
        isa.block_barrier()
        (key,) = isa.load_shared(self._sums + (self._lane & (WARPS - 1)) * SUM_BYTES)
        key = warp_max_key(isa, key)
        isa.block_barrier()
        return key
