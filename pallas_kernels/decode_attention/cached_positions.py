"""Loading the keys and values of cached positions as operands of the matrix unit (see ``program``)."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels.decode_attention.lane_context import (
    BLOCK_POSITIONS,
    CHUNK,
    KEY_CHUNK,
    STEP_POSITIONS,
    LaneContext,
    Refs,
    Shape,
)
from pallas_kernels.decode_attention.slots import cached_slot, load_page
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value

LANE_KEYS = 2
"""Number of positions whose keys a lane holds: ``row`` and ``row + 8``."""

LANE_VALUES = (0, 1, 8, 9)
"""Positions whose scores and values a lane holds, relative to ``2 column``."""


def cached_position(shape: Shape, context: LaneContext, step: Value, index: Value) -> Value:
    """Returns the position in the cache of the warp's position ``index`` of a step."""
    index_in_split = step * BLOCK_POSITIONS + context.warp * STEP_POSITIONS + index
    return index_in_split * shape.splits + context.split


def positions_in_split(shape: Shape, context: LaneContext, count: Value) -> Value:
    """Returns the number of positions of the split among the first ``count`` positions of the row."""
    return (count + (shape.splits - 1) - context.split) // shape.splits


@dataclasses.dataclass(frozen=True)
class CachedPositions:
    """The cached positions of the lane's row and key-value head."""

    isa: Instructions
    shape: Shape
    refs: Refs
    length: Value
    """Number of cached positions before the new tokens."""
    limit: Value
    """Position after the last one that a query attends to, its own not included."""
    first: Value | None
    """First position that a query attends to; None for 0."""
    loaded: Value | None
    """Position that is loaded instead of those that no query attends to; None for 0."""
    loaded_page: list[Value]
    """Page of ``loaded``, as ``slots.load_page`` returns it."""

    @classmethod
    def create(
        cls, isa: Instructions, shape: Shape, refs: Refs, context: LaneContext, length: Value
    ) -> "CachedPositions":
        """Returns the positions of the row of ``context``."""
        limit, first, loaded = length, None, None
        if shape.tokens > 1:
            limit = smaller(isa, length + (shape.tokens - 1), isa.constant(shape.capacity))
        if shape.window is not None:
            zero, last = isa.constant(0), length - 1
            first = length - (shape.window - 1)
            first = isa.select(first < 0, zero, first)
            loaded = isa.select(last < 0, zero, smaller(isa, first, last))
        loaded_page = []
        if shape.page_size is not None:
            position = isa.constant(0) if loaded is None else loaded
            loaded_page = load_page(isa, shape, refs, context.batch, position)
        return cls(isa, shape, refs, length, limit, first, loaded, loaded_page)

    def first_step(self, context: LaneContext) -> Value | None:
        """Returns the first step in which the split has a position that a query attends to; None for 0."""
        if self.first is None:
            return None
        return positions_in_split(self.shape, context, self.first) // BLOCK_POSITIONS

    def load_keys(self, context: LaneContext, step: Value, pages: list[Value]) -> list[Value]:
        """Loads the words of the lane's keys of a step.

        ``pages`` are those of ``load_key_pages``. The position ``loaded`` replaces those that no query uses.
        """
        return self._load(context, step, pages, key_indices(context), load_key, self.refs.keys)

    def load_values(self, context: LaneContext, step: Value, pages: list[Value]) -> list[Value]:
        """Loads the words of the lane's values of a step; see ``load_keys``."""
        return self._load(context, step, pages, value_indices(context), load_value, self.refs.values)

    def load_key_pages(self, context: LaneContext, step: Value, ahead: int = 0) -> list[Value]:
        """Loads the pages of the keys of the step ``step + ahead``; none for a contiguous cache.

        Load the pages one step before the words: then no load of words waits for a page.
        """
        return self._load_pages(context, step, ahead, key_indices(context))

    def load_value_pages(self, context: LaneContext, step: Value, ahead: int = 0) -> list[Value]:
        """Loads the pages of the values of a step; see ``load_key_pages``."""
        return self._load_pages(context, step, ahead, value_indices(context))

    def _load_pages(
        self, context: LaneContext, step: Value, ahead: int, indices: Iterator[Value]
    ) -> list[Value]:
        if self.shape.page_size is None:
            return []
        pages = []
        for index in indices:
            position = cached_position(self.shape, context, step + ahead, index)
            pages += load_page(self.isa, self.shape, self.refs, context.batch, position)
        return pages

    def _load(
        self,
        context: LaneContext,
        step: Value,
        pages: list[Value],
        indices: Iterator[Value],
        load: Callable,
        cache: Any,
    ) -> list[Value]:
        words = []
        for i, index in enumerate(indices):
            position = cached_position(self.shape, context, step, index)
            page = pages[i : i + 1]
            slot = cached_slot(
                self.isa, self.shape, context, position, self.limit, page, self.loaded, self.loaded_page
            )
            row = slot * self.shape.kv_heads + context.kv_head
            words += load(self.isa, self.shape, context, cache, row)
        return words


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a lane has loaded for its next step, before the step begins."""

    keys: list[Value]
    values: list[Value]
    """Empty if the step loads its values itself, after the scores, for want of registers."""
    pages: list[Value]
    """Pages of the keys of the step after the next, and of its values if the step before loads them."""

    def registers(self) -> list[Value]:
        """Returns all registers in a list, for ``Instructions.loop``."""
        return self.keys + self.values + self.pages

    @classmethod
    def from_registers(cls, shape: Shape, registers: list[Value]) -> "Loaded":
        """Inverts ``registers``."""
        keys = LANE_KEYS * shape.words_per_key
        values = keys + (0 if shape.late_values else len(LANE_VALUES) * shape.words_per_value)
        return cls(registers[:keys], registers[keys:values], registers[values:])

    @classmethod
    def load(cls, cache: CachedPositions, context: LaneContext, step: Value, pages: list[Value]) -> "Loaded":
        """Loads a step, whose ``pages`` are loaded, but not the pages of the step after it."""
        keys = cache.load_keys(context, step, pages[:LANE_KEYS])
        values = []
        if not cache.shape.late_values:
            values = cache.load_values(context, step, pages[LANE_KEYS:])
        return cls(keys, values, [])

    @staticmethod
    def load_pages(cache: CachedPositions, context: LaneContext, step: Value, ahead: int = 0) -> list[Value]:
        """Loads the pages of the step ``step + ahead`` for ``load``."""
        pages = cache.load_key_pages(context, step, ahead)
        return pages if cache.shape.late_values else pages + cache.load_value_pages(context, step, ahead)

    def with_pages(self, pages: list[Value]) -> "Loaded":
        """Returns the same with the pages of the step after the next."""
        return dataclasses.replace(self, pages=pages)


def load_key(isa: Instructions, shape: Shape, context: LaneContext, keys: Any, vector: Value) -> list[Value]:
    """Loads the lane's words of a key, an operand of the scores: vector number ``vector`` of ``keys``."""
    base = _vector(isa, shape, keys, vector)
    address = base + isa.widen(context.column * 16)
    words = []
    for first in range(0, shape.head_dim, KEY_CHUNK):
        if (left := shape.head_dim - first) < KEY_CHUNK:
            # Lanes without values repeat others. The queries are 0 there.
            address = base + isa.widen(smaller(isa, context.column, isa.constant(left // 8 - 1)) * 16)
        words += isa.load_global(address + 2 * first, 4, ordered=True, evict_first=True)
    return words


def load_value(
    isa: Instructions, shape: Shape, context: LaneContext, values: Any, vector: Value
) -> list[Value]:
    """Loads the lane's words of a value, an operand of the weighted values; see ``load_key``."""
    base = _vector(isa, shape, values, vector)
    address = base + isa.widen(context.row * 16)
    words = []
    for first in range(0, shape.head_dim, CHUNK):
        if (left := shape.head_dim - first) < CHUNK:
            # Lanes without values repeat others. Nothing reads their weighted values.
            address = base + isa.widen(smaller(isa, context.row, isa.constant(left // 8 - 1)) * 16)
        words += isa.load_global(address + 2 * first, 4, ordered=True, evict_first=True)
    return words


def _vector(isa: Instructions, shape: Shape, array: Any, vector: Value) -> Value:
    """Returns the address of a head's vector in an array of them."""
    return isa.global_address(array) + isa.widen(vector) * (2 * shape.head_dim)


def key_indices(context: LaneContext) -> Iterator[Value]:
    """Yields the positions of a step whose keys the lane holds."""
    for k in range(LANE_KEYS):
        yield context.row + 8 * k


def value_indices(context: LaneContext) -> Iterator[Value]:
    """Yields the positions of a step whose scores and values the lane holds."""
    for v in LANE_VALUES:
        yield context.column * 2 + v


def smaller(isa: Instructions, a: Value, b: Value) -> Value:
    """Returns the smaller of two signed ``i32``."""
    return isa.select(a < b, a, b)
