"""Where a lane of the attention program is: sizes, arrays, its part of the work, its running softmax."""

import dataclasses
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions, Value

WARPS = 8
THREADS = WARPS * LANES
STEP_POSITIONS = 16
"""Positions that a warp works on at once: the size of a matrix instruction."""

BLOCK_POSITIONS = WARPS * STEP_POSITIONS

CHUNK = 64
"""Values of a head that one 16-byte load of each of a row's 8 lanes covers."""

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
    def vector_bytes(self) -> int:
        """Of one head in bfloat16."""
        return 2 * self.head_dim

    @property
    def tops_base(self) -> int:
        """Shared memory: new vectors in bfloat16, every warp's maxima and sums, its weighted values."""
        return (self.group + 2) * self.vector_bytes

    @property
    def mixes_base(self) -> int:
        return self.tops_base + WARPS * self.group * 8

    @property
    def shared_bytes(self) -> int:
        return self.mixes_base + WARPS * self.group * self.head_dim * 4


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
    """A running softmax of the query head that is the lane's row, over the warp's positions so far."""

    maximum: Value
    total: Value
    """This lane's share: the row's four lanes have a sum each."""
    mixed: list[Value]
    """Weighted values: of every block of 8 values (``program``) those of columns ``2 column`` and ``+ 1``."""

    def flat(self) -> list[Value]:
        return [self.maximum, self.total, *self.mixed]

    @classmethod
    def split(cls, carry: list[Value], head_dim: int) -> tuple["Softmax", list[Value]]:
        """What ``flat`` made, and what follows it."""
        end = 2 + head_dim // 4
        return cls(carry[0], carry[1], carry[2:end]), carry[end:]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the lane is; ``row`` and ``column`` as in the matrix instructions."""

    thread: Value
    lane: Value
    warp: Value
    row: Value
    column: Value
    split: Value
    kv_head: Value
    batch: Value
    block: Value


def locate(isa: Instructions, shape: Shape) -> Place:
    """Cuts the grid: split fastest, then kv head, then batch row."""
    thread, block = isa.thread_index(), isa.block_index()
    split, rest = block % shape.splits, block // shape.splits
    lane = thread & (LANES - 1)
    return Place(
        thread=thread,
        lane=lane,
        warp=thread >> 5,
        row=lane >> 2,
        column=lane & 3,
        split=split,
        kv_head=rest % shape.kv_heads,
        batch=rest // shape.kv_heads,
        block=block,
    )
