"""The CTA of the second launch of sampling: its chunks, loops over their keys, and sums over the CTA.

All sums have an order that depends on the row alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.sampling.candidates import (
    LANE_TOKENS,
    LEAST_KEY,
    NO_KEY,
    STATISTICS,
    Candidate,
    Inputs,
    Shape,
    best_of_warp,
    key_address,
    key_of,
    lane_index,
    load,
    number_of,
    warp_max_key,
)
from pallas_kernels.sampling.noise import TINY, Key, log, row_key

THREADS = 512
WARPS = THREADS // LANES

LOG2_E = math.log2(math.e)

SUM_BYTES = 16
"""Bytes of shared memory in which a warp exchanges sums: up to four words."""


def registers(shape: Shape) -> int:
    """Returns the number of chunks of a thread."""
    return -(-shape.chunks // THREADS)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Byte offsets in the shared memory of a CTA.

    Attributes:
      sums: ``SUM_BYTES`` for each warp.
      lists: A list of chunks for each warp.
      maxima: int32 ``[THREADS]``: largest key of the chunks of each thread.
      groups: int32 ``[THREADS]``, largest keys of groups of chunks (see ``ranking``).
      keys, indices, weights: ``[THREADS]``: candidates (see ``ranking``).
      size: Bytes in all.
    """

    sums: int
    lists: int
    maxima: int
    groups: int
    keys: int
    indices: int
    weights: int
    size: int

    @classmethod
    def of(cls, shape: Shape) -> "Layout":
        sizes = [WARPS * SUM_BYTES, WARPS * 4 * LANES * registers(shape)] + [4 * THREADS] * 5
        return cls(*(sum(sizes[:i]) for i in range(len(sizes) + 1)))


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


class Block:
    """The state of a lane.

    Attributes:
      row: The row, one for each CTA.
      thread, lane, warp: Index of the thread in the CTA, of the lane in the warp, and of the warp.
      layout, shared: The offsets and the address of the shared memory.
      chunks: The lane's chunks; a chunk after the last one has the largest key ``NO_KEY``.
      largest: Largest key of each of them.
      scored: Best candidate of each of them (see ``candidates.STATISTICS``).
      top: Largest key of the row.
      sampled: Whether the row is sampled. The others take the largest logit, so they have k = 1.
      k: k of top-k; at most 0 for none.
      p: The share of top-p.
      by_p: Whether top-p filters the row.
      least: Smallest key that min-p keeps.
    """

    def __init__(self, isa: Instructions, shape: Shape, refs: Refs):
        self.isa, self.shape, self.refs, self.layout = isa, shape, refs, Layout.of(shape)
        self.shared = isa.shared_address(refs.shared)
        self.row, self.thread = isa.block_index(), isa.thread_index()
        self.lane, self.warp = self.thread & (LANES - 1), self.thread >> 5
        self._list = self.shared + self.layout.lists + self.warp * (4 * LANES * registers(shape))
        self.chunks = [self.thread + r * THREADS for r in range(registers(shape))]
        self._exists = [chunk < shape.chunks for chunk in self.chunks]
        self.largest = self.statistic(0, NO_KEY)
        # Not every row needs the scores, but loading them now hides the latency.
        self.scored = [
            (isa.bits_to_float(score), token, key)
            for score, token, key in zip(*(self.statistic(i, NO_KEY) for i in (2, 3, 4)), strict=True)
        ]
        self.sampled = isa.constant(0.0, "f32") < self._parameter("temperature", "f32")
        self.k = isa.select(self.sampled, self._parameter("top_k"), isa.constant(1))
        self.p = self._parameter("top_p", "f32")
        self.by_p = self.sampled & (self.p < 1.0)
        min_p = self._parameter("min_p", "f32")
        self.top = self._exchanged_maximum()
        tiny = isa.constant(TINY, "f32")
        least = number_of(isa, self.top) + log(isa, isa.select(min_p < TINY, tiny, min_p))
        self.least = isa.select(min_p < TINY, isa.constant(LEAST_KEY), key_of(isa, least))

    def _parameter(self, name: str, kind: Any = "i32") -> Value:
        return load(self.isa, getattr(self.refs.inputs, name), self.row, kind)

    def _exchanged_maximum(self) -> Value:
        """Stores the threads' largest keys in shared memory and returns that of the row."""
        isa = self.isa
        key = self.largest[0]
        for other in self.largest[1:]:
            key = isa.select(key < other, other, key)
        isa.store_shared(self.shared + self.layout.maxima + (self.thread << 2), [key])
        self._store_of_warp([warp_max_key(isa, key)])
        isa.block_barrier()
        (key,) = self._load_of_warps(1)
        isa.block_barrier()
        return warp_max_key(isa, key)

    # --- chunks ----------------------------------------------------------------------------------
    def statistic(self, i: int, default: int) -> list[Value]:
        """Loads statistic ``i`` of the lane's chunks; ``default`` of those that do not exist."""
        isa, values = self.isa, []
        for chunk, exists in zip(self.chunks, self._exists, strict=True):
            index = (self.row * STATISTICS + i) * self.shape.chunks + isa.select(
                exists, chunk, isa.constant(0)
            )
            address = isa.global_address(self.refs.statistics) + isa.widen(index << 2)
            (value,) = isa.load_global(address, ordered=True)
            values.append(isa.select(exists, value, isa.constant(default)))
        return values

    def listed(self, conditions: Sequence[Value]) -> Value:
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

    def over_listed(
        self,
        count: Value,
        carry: Sequence[Value],
        visit: Callable[[Value, list[Value], list[Value]], list[Value]],
        together: int,
    ) -> list[Value]:
        """Loops over the warp's listed chunks.

        Args:
          count: Number of listed chunks.
          carry: Registers that the loop changes.
          visit: ``carry = visit(index, keys, carry)`` with the index of the lane's first logit in the chunk
            (see ``lane_index``) and the keys of the lane's logits.
          together: Number of chunks whose loads are in flight together. Missing ones have keys ``NO_KEY``.
        """
        isa, shape, shift = self.isa, self.shape, together.bit_length() - 1

        def body(i: Value, carry: list[Value]) -> list[Value]:
            places = [(i << shift) + j for j in range(together)]
            valid = [place < count for place in places]
            chunks = [
                isa.load_shared(self._list + (isa.select(v, place, isa.constant(0)) << 2))[0]
                for v, place in zip(valid, places, strict=True)
            ]
            keys = [
                isa.load_global(
                    key_address(isa, shape, self.refs.keys, self.row, chunk, self.lane), LANE_TOKENS
                )
                for chunk in chunks
            ]
            for chunk, v, lane_keys in zip(chunks, valid, keys, strict=True):
                lane_keys = [isa.select(v, key, isa.constant(NO_KEY)) for key in lane_keys]
                carry = visit(lane_index(isa, shape, chunk, self.lane), lane_keys, carry)
            return carry

        return isa.loop((count + (together - 1)) >> shift, carry, body)

    def weight(self, key: Value) -> Value:
        """Returns the probability of a key relative to that of the largest."""
        isa = self.isa
        return isa.exp2((number_of(isa, key) - number_of(isa, self.top)) * LOG2_E)

    def within_share(self, above: Value, total: Value) -> Value:
        """Returns whether top-p keeps a token, of the weights ``above`` it and those of all tokens."""
        return ~self.by_p | (above < total * self.p) | ~(self.isa.constant(0.0, "f32") < above)

    def noise_key(self) -> Key:
        """Returns the key of the row's noise."""
        return row_key(self.isa, self._parameter("seed"), self._parameter("position"))

    # --- the CTA ---------------------------------------------------------------------------------
    def _store_of_warp(self, words: Sequence[Value]) -> None:
        """Stores 1, 2 or 4 words, which all lanes of the warp have, for the other warps."""
        address = self.shared + self.layout.sums + self.warp * SUM_BYTES
        self.isa.store_shared(address, words, where=self.lane.equals(0))

    def _load_of_warps(self, count: int, kind: Any = "i32") -> list[Value]:
        """Loads the words of warp ``lane % WARPS``."""
        address = self.shared + self.layout.sums + (self.lane & (WARPS - 1)) * SUM_BYTES
        return self.isa.load_shared(address, count, kind)

    def sums(self, numbers: Sequence[Value]) -> list[Value]:
        """Adds up one to four ``f32`` over the CTA; every lane gets the totals."""
        isa, totals = self.isa, list(numbers)
        totals += [isa.constant(0.0, "f32")] * ({3: 4}.get(len(totals), len(totals)) - len(totals))
        for distance in (1, 2, 4, 8, 16):
            totals = [total + isa.shuffle_xor(total, distance) for total in totals]
        self._store_of_warp([isa.float_to_bits(total) for total in totals])
        isa.block_barrier()
        totals = self._load_of_warps(len(totals), "f32")
        for distance in (1, 2, 4, 8):
            totals = [total + isa.shuffle_xor(total, distance) for total in totals]
        isa.block_barrier()
        return totals[: len(numbers)]

    def scan(self, number: Value) -> tuple[Value, Value]:
        """Returns the sum of an ``i32`` over the threads before this one, and over the CTA."""
        isa = self.isa
        before, total = isa.constant(0), number
        for distance in (1, 2, 4, 8, 16):
            other = isa.shuffle_xor(total, distance)
            before = before + isa.select((self.lane & distance).equals(0), isa.constant(0), other)
            total = total + other
        self._store_of_warp([total])
        isa.block_barrier()
        (total,) = self._load_of_warps(1)  # Lane w has the sum of warp w.
        isa.block_barrier()
        earlier = isa.reduce_add(isa.select(self.lane < self.warp, total, isa.constant(0)))
        total = isa.reduce_add(isa.select(self.lane < WARPS, total, isa.constant(0)))
        return before + earlier, total

    def best(self, candidate: Candidate) -> Candidate:
        """Returns the best of the lanes' candidates."""
        isa = self.isa
        score, token, key = best_of_warp(isa, candidate)
        self._store_of_warp([isa.float_to_bits(score), token, key, key])
        isa.block_barrier()
        score, token, key, _ = self._load_of_warps(4)
        isa.block_barrier()
        return best_of_warp(isa, (isa.bits_to_float(score), token, key))
