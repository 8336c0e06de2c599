"""The context of a lane of the attention program: sizes, arrays, indices and its online softmax."""

import dataclasses
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions, Value

WARPS = 8
THREADS = WARPS * LANES

STEP_POSITIONS = 16
"""Number of cached positions that a warp attends to in one step: K of the matrix instruction."""

BLOCK_POSITIONS = WARPS * STEP_POSITIONS
"""Number of cached positions that a CTA attends to in one step."""

CHUNK = 64
"""Number of values of a head that the 8 lanes of a column load with one 16-byte load each."""

MASKED_SCORE = -1e30
"""Score of a position that does not exist. Finite, so that differences of scores are finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Static sizes of one launch.

    Attributes:
      batch: Number of sequences.
      kv_heads: Number of key-value heads.
      queries_per_kv: Number of query heads that share a key-value head.
      head_dim: Number of values in a head.
      capacity: Number of positions in the cache.
      splits: Number of parts of the positions of one key-value head. Each has a separate softmax.
      eps: Epsilon of the query and key norms; None without norms.
      num_partials: Number of partial sums of the projection ``qkv``.
      stored_features: Number of features of ``qkv``, padding included.
      splits_per_block: Number of splits that a CTA attends to one after another; divides ``splits``.
      page_size: Number of positions in a page of the cache; None for a contiguous cache. Divides
        ``capacity``.
      num_pages: Number of pages in the cache.
    """

    batch: int
    kv_heads: int
    queries_per_kv: int
    head_dim: int
    capacity: int
    splits: int
    eps: float | None
    num_partials: int
    stored_features: int
    splits_per_block: int = 1
    page_size: int | None = None
    num_pages: int = 0

    @property
    def blocks(self) -> int:
        """Number of CTAs."""
        return self.batch * self.kv_heads * (self.splits // self.splits_per_block)

    @property
    def vectors(self) -> int:
        """Number of heads that a CTA prepares: its query heads, the new key and the new value."""
        return self.queries_per_kv + 2

    @property
    def vector_bytes(self) -> int:
        """Bytes of one head in bfloat16."""
        return 2 * self.head_dim

    @property
    def step_words(self) -> int:
        """Number of words of keys and values that a lane loads for a step."""
        return self.head_dim // 2

    # --- shared memory: new vectors in bfloat16, softmax sums of each warp, accumulators of each warp ---
    @property
    def softmax_base(self) -> int:
        return self.vectors * self.vector_bytes

    @property
    def accumulator_base(self) -> int:
        return self.softmax_base + WARPS * self.queries_per_kv * 8

    @property
    def shared_bytes(self) -> int:
        return self.accumulator_base + WARPS * self.queries_per_kv * self.head_dim * 4


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      qkv: float32 ``[partials, B, features]``: the new tokens' query, key and value heads, not yet summed.
      cos, sin: float32 ``[B, D / 2]``, of the rotation angles.
      q_scale, k_scale: bfloat16 ``[D]``: the norm scales of queries and keys.
      lengths: int32 ``[B]``: number of positions in the cache.
      keys, values: bfloat16 ``[B, S, kv_heads, D]``: the cache; or its pages, ``[pages, page_size, kv_heads,
        D]``. The program writes the new token's slot.
      accumulators: Output, float32 ``[B, kv_heads, splits, queries_per_kv, D]``: the weighted values.
      softmax: Output, float32 ``[B, kv_heads, splits, queries_per_kv, 2]``: the maximum score, and the sum of
        the weights.
      shared: The shared memory.
      pages: int32 ``[B, S / page_size]``: the pages of each row, in the order of their positions, and numbers
        from ``num_pages`` on where there is no page. None for a contiguous cache.
    """

    qkv: Any
    cos: Any
    sin: Any
    q_scale: Any
    k_scale: Any
    lengths: Any
    keys: Any
    values: Any
    accumulators: Any
    softmax: Any
    shared: Any
    pages: Any = None


@dataclasses.dataclass
class OnlineSoftmax:
    """The softmax of query head ``row`` over the positions that the warp has attended to so far."""

    running_max: Value
    """Largest score; the four lanes of the row hold the same."""
    running_sum: Value
    """Sum of the weights of this lane's positions, a partial sum of the row's four lanes."""
    accumulator: list[Value]
    """Weighted values: elements ``2 column`` and ``2 column + 1`` of every block of 8 (see ``program``)."""

    def registers(self) -> list[Value]:
        """Returns all registers in a list, for ``Instructions.loop``."""
        return [self.running_max, self.running_sum, *self.accumulator]

    @classmethod
    def from_registers(cls, registers: list[Value], head_dim: int) -> tuple["OnlineSoftmax", list[Value]]:
        """Inverts ``registers``; also returns the registers that follow."""
        end = 2 + head_dim // 4
        return cls(registers[0], registers[1], registers[2:end]), registers[end:]


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices of the lane. ``Instructions.matrix_multiply_add`` defines ``row`` and ``column``.

    ``part`` is the index of the split among those of all heads and sequences.
    """

    thread: Value
    lane: Value
    warp: Value
    row: Value
    column: Value
    split: Value
    kv_head: Value
    batch: Value
    part: Value

    def shifted(self, index: Value) -> "LaneContext":
        """Returns the context of a later split of the CTA."""
        return dataclasses.replace(self, split=self.split + index, part=self.part + index)


def lane_context(isa: Instructions, shape: Shape) -> LaneContext:
    """Computes the context of the first split of the CTA.

    Over the grid the split varies fastest, then the kv head, then the sequence.
    """
    thread, part = isa.thread_index(), isa.block_index()
    if shape.splits_per_block > 1:
        part = part * shape.splits_per_block
    split, rest = part % shape.splits, part // shape.splits
    lane = thread & (LANES - 1)
    return LaneContext(
        thread=thread,
        lane=lane,
        warp=thread >> 5,
        row=lane >> 2,
        column=lane & 3,
        split=split,
        kv_head=rest % shape.kv_heads,
        batch=rest // shape.kv_heads,
        part=part,
    )
