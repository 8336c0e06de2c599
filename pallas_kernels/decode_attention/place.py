"""Where a lane of the attention program is: sizes, arrays, its part of the work, its running softmax."""

import dataclasses
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions, Value

WARPS = 8
THREADS = WARPS * LANES
GROUP_LANES = 8
"""Lanes that share a position: each loads 16 bytes of every 64 values."""

GROUPS = THREADS // GROUP_LANES
"""Positions that the CTA works on at once."""

AHEAD = 2
"""Positions that each group has loaded, or is loading, before it computes with the next one."""

CHUNK = 8 * GROUP_LANES
"""Values of a head that one 16-byte load of each of the group's lanes covers."""

NEVER = -1e30
"""A score below all others, finite so that differences are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Static sizes. ``eps`` is that of the query and key norms, None without them."""

    batch: int
    kv_heads: int
    group: int
    """Query heads that share a kv head."""
    head_dim: int
    capacity: int
    splits: int
    eps: float | None
    parts: int
    """Partial sums that qkv comes in."""
    stored_columns: int
    """Columns of those, padding included."""

    @property
    def blocks(self) -> int:
        return self.batch * self.kv_heads * self.splits

    @property
    def shared_bytes(self) -> int:
        """New vectors, then every warp's maximum and sum, then its weighted values; all float32."""
        vectors = (self.group + 2) * self.head_dim
        return 4 * (vectors + WARPS * self.group * (2 + self.head_dim))


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the CTA's shared memory.

    ``qkv f32 [parts, B, columns]``, ``cos, sin f32 [B, D / 2]``, ``q_scale, k_scale bf16 [D]``,
    ``lengths i32 [B]``, ``keys, values bf16 [B, S, kv_heads, D]`` (read, and one slot written); written:
    ``mixed f32 [B, kv_heads, splits, group, D]``, the weighted values, and ``tops f32 [B, kv_heads, splits,
    group, 2]``, the maximum and the sum of each softmax.
    """

    qkv: Any
    cos: Any
    sin: Any
    q_scale: Any
    k_scale: Any
    lengths: Any
    keys: Any
    values: Any
    mixed: Any
    tops: Any
    shared: Any


@dataclasses.dataclass
class Softmax:
    """A running softmax for every query head of the group, over the positions seen so far."""

    maxima: list[Value]
    sums: list[Value]
    weighted: list[list[Value]]
    """[head][value]: the lane's share of the head dimension."""

    def flat(self) -> list[Value]:
        return [*self.maxima, *self.sums, *(v for head in self.weighted for v in head)]

    @classmethod
    def split(cls, carry: list[Value], heads: int, width: int) -> tuple["Softmax", list[Value]]:
        """What ``flat`` made (``width`` values of each head to a lane), and what follows it."""
        numbers, rest = carry[: heads * (2 + width)], carry[heads * (2 + width) :]
        weighted = numbers[2 * heads :]
        return cls(
            numbers[:heads],
            numbers[heads : 2 * heads],
            [weighted[i * width : (i + 1) * width] for i in range(heads)],
        ), rest


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the lane is."""

    thread: Value
    lane: Value
    warp: Value
    part: Value
    """Of its group's 8 lanes."""
    split: Value
    kv_head: Value
    batch: Value
    block: Value


def locate(isa: Instructions, shape: Shape) -> Place:
    """Cuts the grid: split fastest, then kv head, then batch row."""
    thread, block = isa.thread_index(), isa.block_index()
    split, rest = block % shape.splits, block // shape.splits
    return Place(
        thread=thread,
        lane=thread & (LANES - 1),
        warp=thread >> 5,
        part=thread & (GROUP_LANES - 1),
        split=split,
        kv_head=rest % shape.kv_heads,
        batch=rest // shape.kv_heads,
        block=block,
    )
