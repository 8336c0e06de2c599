"""Loading the keys and values of cached positions as operands of the matrix unit (see ``program``)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from pallas_kernels.decode_attention.lane_context import (
    BLOCK_POSITIONS,
    CHUNK,
    STEP_POSITIONS,
    LaneContext,
    Refs,
    Shape,
)
from pallas_kernels.decode_attention.slots import cached_slot, load_page
from pallas_kernels.lanes.instructions import Instructions, Value

LANE_KEYS = 2
"""Number of positions whose keys a lane holds: ``row`` and ``row + 8``."""

LANE_VALUES = (0, 1, 8, 9)
"""Positions whose scores and values a lane holds, relative to ``2 column``."""


def cached_position(shape: Shape, context: LaneContext, step: Value, index: Value) -> Value:
    """Returns the position in the cache of the warp's position ``index`` of a step."""
    index_in_split = step * BLOCK_POSITIONS + context.warp * STEP_POSITIONS + index
    return index_in_split * shape.splits + context.split


@dataclasses.dataclass(frozen=True)
class CachedPositions:
    """The cached positions of the lane's row and key-value head."""

    isa: Instructions
    shape: Shape
    refs: Refs
    length: Value
    """Number of cached positions."""
    first_page: list[Value]
    """Page of position 0, as ``slots.load_page`` returns it."""

    @classmethod
    def create(
        cls, isa: Instructions, shape: Shape, refs: Refs, context: LaneContext, length: Value
    ) -> "CachedPositions":
        """Returns the positions of the row of ``context``."""
        paged = shape.page_size is not None
        first_page = load_page(isa, shape, refs, context, isa.constant(0)) if paged else []
        return cls(isa, shape, refs, length, first_page)

    def load_pages(self, context: LaneContext, step: Value, ahead: int = 0) -> list[Value]:
        """Loads the pages of the step ``step + ahead``, for ``load``; none for a contiguous cache.

        Load the pages one step before the words: then no load of words waits for a page.
        """
        if self.shape.page_size is None:
            return []
        pages = []
        for index in _lane_positions(context):
            position = cached_position(self.shape, context, step + ahead, index)
            pages += load_page(self.isa, self.shape, self.refs, context, position)
        return pages

    def load(self, context: LaneContext, step: Value, pages: list[Value]) -> list[Value]:
        """Loads the words of a step: keys, then values; position 0 replaces positions that do not exist."""
        words = []
        for i, index in enumerate(_lane_positions(context)):
            position = cached_position(self.shape, context, step, index)
            page = pages[i : i + 1]
            slot = cached_slot(self.isa, self.shape, context, position, self.length, page, self.first_page)
            words += self._key(context, slot) if i < LANE_KEYS else self._value(context, slot)
        return words

    def _key(self, context: LaneContext, slot: Value) -> list[Value]:
        """Loads the lane's words of a cached key, an operand of the scores."""
        isa = self.isa
        base = self._vector(self.refs.keys, context, slot) + isa.widen(context.column * 16)
        return [
            word
            for t in range(self.shape.head_dim // 32)
            for word in isa.load_global(base + t * 64, 4, ordered=True, evict_first=True)
        ]

    def _value(self, context: LaneContext, slot: Value) -> list[Value]:
        """Loads the lane's words of a cached value, an operand of the weighted values."""
        isa = self.isa
        base = self._vector(self.refs.values, context, slot) + isa.widen(context.row * 16)
        return [
            word
            for chunk in range(self.shape.head_dim // CHUNK)
            for word in isa.load_global(base + chunk * 2 * CHUNK, 4, ordered=True, evict_first=True)
        ]

    def _vector(self, cache: Any, context: LaneContext, slot: Value) -> Value:
        """Returns the address of the head's vector in a slot."""
        row = slot * self.shape.kv_heads + context.kv_head
        return self.isa.global_address(cache) + self.isa.widen(row) * self.shape.vector_bytes


def _lane_positions(context: LaneContext) -> Iterator[Value]:
    """Yields the lane's positions of a step: those of its keys, then those of its values."""
    for k in range(LANE_KEYS):
        yield context.row + 8 * k
    for v in LANE_VALUES:
        yield context.column * 2 + v
