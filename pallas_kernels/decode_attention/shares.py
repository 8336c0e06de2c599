"""Attention of a CTA to several splits: its warps divide the work, and merge once for several splits.

The share of a warp in a split is the positions that the warp attends to in a CTA with one split: 16 of every
128. A share has a separate softmax, so the warp that computes it does not change the result. Short contexts
have fewer shares than warps: 1,024 positions in 16 splits are 4 shares of each. A CTA with several splits
therefore counts the shares that have positions, and each warp attends to every eighth of them, without
waiting for other warps. It loads the first step of its next share while it ends the last step of this one.

The softmaxes wait in shared memory, in one slot for each share. When the slots are full (a round), the CTA
merges the shares of each split in their order, as ``merging`` does for one split.
"""

import dataclasses

from pallas_kernels.decode_attention.cached_positions import (
    CachedPositions,
    Loaded,
    positions_in_split,
    smaller,
)
from pallas_kernels.decode_attention.lane_context import (
    BLOCK_POSITIONS,
    MASKED_SCORE,
    OCTET,
    STEP_POSITIONS,
    THREADS,
    WARPS,
    LaneContext,
    Refs,
    Shape,
)
from pallas_kernels.decode_attention.online_softmax import (
    OnlineSoftmax,
    Queries,
    from_registers,
    larger,
    to_registers,
)
from pallas_kernels.decode_attention.split import AttendOwn, attend_new_tokens, attend_step
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value


@dataclasses.dataclass(frozen=True)
class Place:
    """A step of a warp: the round, the index of the share in the round, and the step of the split."""

    round: Value
    index: Value
    step: Value


@dataclasses.dataclass(frozen=True)
class Shares:
    """The shares of a CTA. A warp attends to those whose index in the round is the warp's plus 0, 8, 16 ...

    Indices count from the last share of the last split, which attends to the new tokens before its cached
    positions. If that share has no cached positions, its index is negative.
    """

    isa: Instructions
    shape: Shape
    context: LaneContext
    """Context of the CTA's first split."""
    cache: CachedPositions
    active: Value
    """Number of shares of a split that have cached positions; one of them may be empty in later splits."""
    splits: Value
    """Number of splits in a round."""

    @classmethod
    def create(
        cls, isa: Instructions, shape: Shape, context: LaneContext, cache: CachedPositions
    ) -> "Shares":
        """Returns the shares of the CTA whose first split is that of ``context``."""
        positions = positions_in_split(shape, context, cache.limit)
        active = (positions + (STEP_POSITIONS - 1)) // STEP_POSITIONS
        active = smaller(isa, active, isa.constant(WARPS))
        splits = isa.constant(shape.splits_in_round(WARPS))
        for count in reversed(range(1, WARPS)):
            if shape.splits_in_round(count) > shape.splits_in_round(count + 1):
                splits = isa.select(active < count + 1, isa.constant(shape.splits_in_round(count)), splits)
        return cls(isa, shape, context, cache, active, splits)

    @property
    def count(self) -> Value:
        """Number of shares of a round that have cached positions."""
        return self.splits * self.active

    @property
    def rounds(self) -> Value:
        """Number of rounds."""
        return self.isa.constant(self.shape.splits_per_block) // self.splits

    def locate(self, round_index: Value, index: Value) -> tuple[LaneContext, Value]:
        """Returns the context of a share, whose warp is that of the share, and its slot."""
        isa, is_extra = self.isa, index < 0
        number = self.count - 1 - index
        number = isa.select(number < 0, isa.constant(0), number)  # There is no such share.
        if self.shape.same_share:
            warp = number // self.splits
            split = number - warp * self.splits
        else:
            split = number // isa.select(self.active < 1, isa.constant(1), self.active)
            warp = number - split * self.active
        slot = isa.select(is_extra, self.count, split * self.active + warp)
        warp = isa.select(is_extra, isa.constant(WARPS - 1), warp)
        split = isa.select(is_extra, self.splits - 1, split)
        context = self.context.shifted(round_index * self.splits + split)
        return dataclasses.replace(context, warp=warp), slot

    def first_step(self, context: LaneContext) -> Value:
        """Returns the first step of a share."""
        step = self.cache.first_step(context)
        return self.isa.constant(0) if step is None else step

    def end_step(self, context: LaneContext) -> Value:
        """Returns the step after the last one of a share, which has at least one step, possibly without
        positions."""
        positions = positions_in_split(self.shape, context, self.cache.limit)
        before = context.warp * STEP_POSITIONS
        end = (positions - before + (BLOCK_POSITIONS - 1)) // BLOCK_POSITIONS
        end = self.isa.select(before < positions, end, self.isa.constant(0))
        first = self.first_step(context)
        return self.isa.select(first < end, end, first + 1)

    def first_place(self) -> Place:
        """Returns the first step of the warp."""
        zero = self.isa.constant(0)
        return Place(zero, self.context.warp, self.first_step(self.locate(zero, self.context.warp)[0]))

    def after(self, place: Place) -> Place:
        """Returns the next step of the warp: of the same share, of its next one, or of the next round."""
        isa = self.isa
        context, _ = self.locate(place.round, place.index)
        following = place.step + 1
        in_share = following < self.end_step(context)
        next_index = place.index + WARPS
        same_round = in_share | (next_index < self.count)
        index = isa.select(same_round, next_index, self.context.warp)
        index = isa.select(in_share, place.index, index)
        round_index = isa.select(same_round, place.round, place.round + 1)
        if self.cache.first is None:
            first = isa.constant(0)
        else:
            first = self.first_step(self.locate(round_index, index)[0])
        return Place(round_index, index, isa.select(in_share, following, first))

    def load_first(self) -> Loaded:
        """Loads the first step of the warp, and the pages of the second one."""
        place = self.first_place()
        loaded = self.load(place, self.load_pages(place))
        if self.shape.page_size is None:
            return loaded
        return loaded.with_pages(self.load_pages(self.after(place)))

    def load(self, place: Place, pages: list[Value]) -> Loaded:
        """Loads the words of a step; see ``Loaded.load``."""
        return Loaded.load(self.cache, *self._loaded(place), pages)

    def load_pages(self, place: Place) -> list[Value]:
        """Loads the pages of a step; see ``Loaded.load_pages``."""
        if self.shape.page_size is None:
            return []
        return Loaded.load_pages(self.cache, *self._loaded(place))

    def _loaded(self, place: Place) -> tuple[LaneContext, Value]:
        """Returns context and step. A warp without a next step gets a step beyond the capacity."""
        context, _ = self.locate(place.round, place.index)
        exists = (place.index < self.count) & (place.round < self.rounds)
        beyond = self.shape.capacity // (BLOCK_POSITIONS * self.shape.splits) + 1
        return context, self.isa.select(exists, place.step, self.isa.constant(beyond))


def attend_shares(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    shares: Shares,
    shared: Value,
    queries: Queries,
    attend_own: AttendOwn,
    has_new_tokens: Value,
    loaded: Loaded,
) -> None:
    """Attends to all splits of the CTA and writes their results.

    Args:
      isa: The instructions.
      shape: Static sizes.
      refs: The arrays.
      shares: The shares of the CTA.
      shared: Address of the shared memory.
      queries: The lane's words of its query rows.
      attend_own: Lets each new token attend to itself.
      has_new_tokens: Whether the last split of the CTA attends to the new tokens.
      loaded: The first step of the warp.
    """
    cache, warp = shares.cache, shares.context.warp
    rounds, count = shares.rounds, shares.count
    store_empty_share(isa, shape, shared, shares.context)

    def attend_round(round_index: Value, carry: list[Value]) -> list[Value]:
        has_new = has_new_tokens & round_index.equals(rounds - 1)
        has_extra = has_new & (shares.active < WARPS)
        extra = isa.select(has_extra & warp.equals(0), isa.constant(1), isa.constant(0))

        def attend_share(number: Value, carry: list[Value]) -> list[Value]:
            index = warp + (number - extra) * WARPS
            context, slot = shares.locate(round_index, index)
            is_new = has_new & context.split.equals(shape.splits - 1) & context.warp.equals(WARPS - 1)
            softmaxes = attend_new_tokens(isa, shape, attend_own, is_new)
            first = shares.first_step(context)
            steps = isa.select(index < 0, isa.constant(0), shares.end_step(context) - first)

            def attend_next(number: Value, carry: list[Value]) -> list[Value]:
                step = first + number
                softmaxes, rest = from_registers(carry, shape)
                words = Loaded.from_registers(shape, rest)
                softmaxes = attend_step(isa, shape, context, cache, queries, softmaxes, words, step)
                following = shares.after(Place(round_index, index, step))
                loaded = shares.load(following, words.pages)
                if shape.page_size is not None:
                    loaded = loaded.with_pages(shares.load_pages(shares.after(following)))
                return to_registers(softmaxes) + loaded.registers()

            softmaxes, rest = from_registers(
                isa.loop(steps, to_registers(softmaxes) + carry, attend_next), shape
            )
            store_share(isa, shape, softmaxes, context, shared + shape.slot_address(slot))
            return rest

        own = isa.select(warp < count, (count - warp + (WARPS - 1)) // WARPS, isa.constant(0))
        carry = isa.loop(own + extra, carry, attend_share)
        isa.block_barrier()
        merge_round(isa, shape, refs, shares, round_index, has_extra, shared)
        isa.block_barrier()  # The next round writes the slots again.
        return carry

    isa.loop(rounds, loaded.registers(), attend_round)


# A slot holds the accumulators of the lanes by quarter of a chunk (4 registers), row and column, then the
# running max and sum of each row. The lanes of a warp therefore store consecutive words. Quarters are 32
# modulo 128 bytes apart, so 8 lanes that load 32 consecutive values use all banks.


def store_empty_share(isa: Instructions, shape: Shape, shared: Value, context: LaneContext) -> None:
    """Stores a running max and sum, and 4 accumulators, that stand for a share without positions."""
    zero, masked = isa.constant(0.0, "f32"), isa.constant(MASKED_SCORE, "f32")
    first = context.thread.equals(0)
    isa.store_shared(shared + shape.slot_base, [masked, zero, zero, zero], first)
    isa.store_shared(shared + (shape.slot_base + 16), [zero] * 4, first)


def store_share(
    isa: Instructions, shape: Shape, softmaxes: list[OnlineSoftmax], context: LaneContext, slot: Value
) -> None:
    """Stores the softmaxes of a share in the slot with that address."""
    for octet, softmax in enumerate(softmaxes):
        total = softmax.running_sum
        for distance in (1, 2):
            total = total + isa.shuffle_xor(total, distance)
        row = context.row if octet == 0 else context.row + OCTET * octet
        is_row = row < shape.rows
        pair = slot + shape.slot_pairs + row * 8
        isa.store_shared(pair, [softmax.running_max, total], is_row & context.column.equals(0))
        target = slot + (row * 4 + context.column) * 16
        for quarter in range(shape.quarters):
            chunk, half, part = quarter // 4, quarter // 2 % 2, quarter % 2
            blocks = range(chunk * 8 + part * 4, chunk * 8 + part * 4 + 4)
            run = [softmax.accumulator[2 * block + half] for block in blocks]
            isa.store_shared(target + quarter * shape.quarter_bytes, run, is_row)


def merge_round(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    shares: Shares,
    round_index: Value,
    has_extra: Value,
    shared: Value,
) -> None:
    """Merges the shares of each split of a round, and writes the results of the splits."""
    rows, words = shape.rows, shape.head_dim // 4
    context, empty = shares.context, shared + shape.slot_base
    first_part = context.part + round_index * shares.splits
    items, last_split, count = shares.splits * (rows * words), shares.splits - 1, shares.count

    def merge_values(number: Value, _: list[Value]) -> list[Value]:
        """Merges 4 values of a row of a split."""
        item = context.thread + number * THREADS
        with isa.when(item < items):
            split, rest = item // (rows * words), item % (rows * words)
            row, word = rest // words, rest % words
            quarter = (word >> 4) * 4 + (word & 3)
            offset = quarter * shape.quarter_bytes + row * 64 + ((word >> 2) & 3) * 16
            pairs: list[list[Value]] = []
            addresses: list[Value] = []
            for warp in range(WARPS):
                exists, index = shares.active >= warp + 1, split * shares.active + warp
                if warp == WARPS - 1:
                    is_extra = has_extra & split.equals(last_split)
                    exists, index = exists | is_extra, isa.select(is_extra, count, index)
                slot = shared + shape.slot_address(index)
                pair_address = isa.select(exists, slot + shape.slot_pairs + row * 8, empty)
                pairs.append(isa.load_shared(pair_address, 2, "f32"))
                addresses.append(isa.select(exists, slot + offset, empty + 16))
            running_max = pairs[0][0]
            for share_max, _share_sum in pairs[1:]:
                running_max = larger(isa, running_max, share_max)
            running_sum = isa.constant(0.0, "f32")
            sums = [running_sum] * 4
            for (share_max, share_sum), address in zip(pairs, addresses, strict=True):
                factor = isa.exp2(share_max - running_max)
                values = isa.load_shared(address, 4, "f32")
                running_sum = isa.multiply_add(factor, share_sum, running_sum)
                sums = [isa.multiply_add(factor, a, s) for a, s in zip(values, sums, strict=True)]
            pair = (first_part + split) * rows + row
            out = isa.widen((pair * shape.head_dim + word * 4) << 2)
            isa.store_global(isa.global_address(refs.accumulators) + out, sums)
            with isa.when(word.equals(0)):
                address = isa.global_address(refs.softmax) + isa.widen(pair << 3)
                isa.store_global(address, [running_max, running_sum])
        return []

    isa.loop((items + (THREADS - 1)) // THREADS, [], merge_values)
