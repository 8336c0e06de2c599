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
      splits: Number of CTAs that share the positions of one key-value head.
      eps: Epsilon of the query and key norms; None without norms.
      num_partials: Number of partial sums of the projection ``qkv``.
      stored_features: Number of features of ``qkv``, padding included.
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

    @property
    def blocks(self) -> int:
        """Number of CTAs."""
        return self.batch * self.kv_heads * self.splits

    @property
    def vector_bytes(self) -> int:
        """Bytes of one head in bfloat16."""
        return 2 * self.head_dim

    # --- shared memory: new vectors in bfloat16, softmax sums of each warp, accumulators of each warp ---
    @property
    def softmax_base(self) -> int:
        return (self.queries_per_kv + 2) * self.vector_bytes

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
      keys, values: bfloat16 ``[B, S, kv_heads, D]``: the cache. The program writes the new token's slot.
      accumulators: Output, float32 ``[B, kv_heads, splits, queries_per_kv, D]``: the weighted values.
      softmax: Output, float32 ``[B, kv_heads, splits, queries_per_kv, 2]``: the maximum score, and the sum of
        the weights.
      shared: The shared memory.
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
    """Indices of the lane. ``Instructions.matrix_multiply_add`` defines ``row`` and ``column``."""

    thread: Value
    lane: Value
    warp: Value
    row: Value
    column: Value
    split: Value
    kv_head: Value
    batch: Value
    block: Value


def lane_context(isa: Instructions, shape: Shape) -> LaneContext:
    """Computes the context. Over the grid the split varies fastest, then the kv head, then the sequence."""
    thread, block = isa.thread_index(), isa.block_index()
    split, rest = block % shape.splits, block // shape.splits
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
        block=block,
    )
