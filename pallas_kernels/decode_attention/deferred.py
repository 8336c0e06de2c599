"""The merge of attention in the prologue of the product that reads its result (see ``prologues``)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_kernels.decode_attention.lane_context import Shape
from pallas_kernels.decode_attention.merging import load_sink, merge_splits
from pallas_kernels.lanes.instructions import Instructions, Value
from pallas_kernels.prologues.deferred import rounded


class LoadedHead(NamedTuple):
    """The results of all splits for some channels of one query head."""

    softmax: list[list[Value]]
    """``[split]``: running max and running sum."""
    accumulators: list[list[Value]]
    """``[split][channel]``: weighted values."""
    sink: list[Value]


@dataclasses.dataclass(frozen=True)
class AttentionSource:
    """A ``prologues.deferred.Source``. Its arrays are those of ``merging.MergeRefs``, in their order.

    Attributes:
      shape: Sizes of the launch of attention, with one sequence and one token.
    """

    shape: Shape

    @property
    def features(self) -> int:
        """Number of features of the row."""
        return self.shape.kv_heads * self.shape.queries_per_kv * self.shape.head_dim

    def load(
        self, isa: Instructions, refs: Sequence[Any], channels: list[Value], span: int
    ) -> list[LoadedHead]:
        """Loads the results of all splits. Channels within a span that divides a head share its softmax."""
        if span and self.shape.head_dim % span == 0:
            return [self._load_head(isa, refs, channels)]
        return [self._load_head(isa, refs, [channel]) for channel in channels]

    def _load_head(self, isa: Instructions, refs: Sequence[Any], channels: list[Value]) -> LoadedHead:
        """Loads the results for channels of one query head."""
        shape, dim = self.shape, self.shape.head_dim
        accumulators_ref, softmax_ref, *sinks = refs
        sinks_ref = sinks[0] if sinks else None
        head = channels[0] // dim
        kv_head, query = head // shape.queries_per_kv, head % shape.queries_per_kv
        first = kv_head * (shape.splits * shape.rows) + query
        softmax = isa.global_address(softmax_ref) + isa.widen(first << 3)
        pairs = [
            isa.load_global(softmax + 8 * shape.rows * split, 2, "f32", ordered=True)
            for split in range(shape.splits)
        ]
        # The first accumulator of each channel; those of the next splits follow at a constant distance.
        base = isa.global_address(accumulators_ref)
        addresses = [base + isa.widen((first * dim + channel % dim) << 2) for channel in channels]
        accumulators = [
            [
                isa.load_global(address + 4 * dim * shape.rows * split, kind="f32", ordered=True)[0]
                for address in addresses
            ]
            for split in range(shape.splits)
        ]
        return LoadedHead(pairs, accumulators, load_sink(isa, sinks_ref, head, ordered=True))

    def combine(self, isa: Instructions, loaded: list[LoadedHead]) -> list[Value]:
        """Merges the splits of each channel."""
        merged = [merge_splits(isa, head.softmax, head.accumulators, head.sink) for head in loaded]
        return [rounded(isa, number) for numbers in merged for number in numbers]
