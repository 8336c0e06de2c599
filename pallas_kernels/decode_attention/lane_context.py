"""The context of a lane of the attention program: sizes, arrays and indices."""

import dataclasses
import math
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value

WARPS = 8
THREADS = WARPS * LANES

STEP_POSITIONS = 16
"""Number of cached positions that a warp attends to in one step: K of the matrix instruction."""

BLOCK_POSITIONS = WARPS * STEP_POSITIONS
"""Number of cached positions that a CTA attends to in one step."""

CHUNK = 64
"""Number of values of a head that the 8 lanes of a column load with one 16-byte load each."""

KEY_CHUNK = 32
"""Number of values of a key that the 4 lanes of a row load with one 16-byte load each."""

OCTET = 8
"""Number of query rows whose scores a warp has in one register of each lane."""

MAX_OCTETS = 8
REGISTERS = 192
"""Largest number of registers of a lane for accumulators and for the words of a step."""

MAX_STEP_WORDS = 64
"""Largest number of words of a step that a lane loads before the step begins."""

SLOT_ALIGNMENT = 32
"""Alignment in bytes of the slots of ``shares``, and size of the empty share before them."""

MASKED_SCORE = -1e30
"""Score of a position that does not exist. Finite, so that differences of scores are finite."""


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Tuning of CTAs that attend to several splits (see ``shares``). It changes no result.

    Attributes:
      shared_limit: Most bytes of shared memory of a CTA whose warps divide shares. Every supported GPU has
        99 KiB. If the limit leaves fewer than ``WARPS`` slots, a CTA attends to one split after another.
      same_share_capacity: Smallest capacity of a cache from which on neighbouring warps attend to the same
        share of neighbouring splits, which reads neighbouring positions, instead of neighbouring shares of a
        split, which are equally full. In a cache of 4,224 positions on an H200, texts of 4,160 take 11 to
        13 % less time, and texts of 1,056 between 0.5 % less and 3 % more. The lengths of texts are not
        known when a program is compiled, so the capacity decides.
    """

    shared_limit: int = 99 << 10
    same_share_capacity: int = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Static sizes and options of one launch.

    A query row is one query head of one new token: row ``t * queries_per_kv + h`` of a key-value head.

    Attributes:
      batch: Number of sequences.
      kv_heads: Number of key-value heads.
      queries_per_kv: Number of query heads that share a key-value head.
      head_dim: Number of values in a head, a multiple of 16.
      capacity: Number of positions in the cache.
      splits: Number of parts of the positions of one key-value head. Each has a separate softmax.
      eps: Epsilon of the query and key norms; None without norms.
      num_partials: Number of partial sums of the projection ``qkv``.
      stored_features: Number of features of ``qkv``, padding included.
      tokens: Number of new tokens of each sequence.
      splits_per_block: Number of splits that a CTA attends to one after another; divides ``splits``.
      shared_limit: ``SplitConfig.shared_limit``.
      same_share: Whether neighbouring warps attend to the same share of neighbouring splits (see
        ``SplitConfig``).
      page_size: Number of positions in a page of the cache; None for a contiguous cache. Divides
        ``capacity``.
      num_pages: Number of pages in the cache.
      window: Number of last positions that a token attends to, its own included; None for all.
      scale: Factor of the scores; None for ``head_dim ** -0.5``.
      soft_cap: Limit c of the scaled scores s, which become ``c * tanh(s / c)``; None for no limit.
      has_sinks: Whether each query head has a sink, a score without a value.
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
    tokens: int = 1
    splits_per_block: int = 1
    shared_limit: int = 0
    same_share: bool = False
    page_size: int | None = None
    num_pages: int = 0
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    has_sinks: bool = False

    @property
    def score_scale(self) -> float:
        """Factor of the scores."""
        return 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def rows(self) -> int:
        """Number of query rows of a key-value head."""
        return self.tokens * self.queries_per_kv

    @property
    def octets(self) -> int:
        """Number of octets of query rows of a CTA: as many as fit in registers, evenly distributed."""
        total = -(-self.rows // OCTET)
        words = self.step_words // 2 if self.late_values else self.step_words
        most = (REGISTERS - words) // (self.accumulated // 4)
        return -(-total // -(-total // min(most, MAX_OCTETS)))

    @property
    def row_groups(self) -> int:
        """Number of CTAs that share a split: each attends from ``octets`` octets of query rows."""
        return -(-self.rows // (OCTET * self.octets))

    @property
    def blocks(self) -> int:
        """Number of CTAs."""
        return self.batch * self.kv_heads * (self.splits // self.splits_per_block) * self.row_groups

    @property
    def vectors(self) -> int:
        """Number of heads that a CTA prepares for one new token: query heads, the new key, the new value."""
        return self.queries_per_kv + 2

    @property
    def key_values(self) -> int:
        """Number of values of a key that the lanes hold: ``head_dim``, padded to whole chunks."""
        return -(-self.head_dim // KEY_CHUNK) * KEY_CHUNK

    @property
    def accumulated(self) -> int:
        """Number of weighted values that the lanes hold: ``head_dim``, padded to whole chunks."""
        return -(-self.head_dim // CHUNK) * CHUNK

    @property
    def words_per_key(self) -> int:
        """Number of words of a key that a lane loads."""
        return self.key_values // 8

    @property
    def words_per_value(self) -> int:
        """Number of words of a value that a lane loads."""
        return self.accumulated // 16

    @property
    def step_words(self) -> int:
        """Number of words of keys and values that a lane loads for a step: two keys and four values."""
        return 2 * self.words_per_key + 4 * self.words_per_value

    @property
    def late_values(self) -> bool:
        """Whether a step loads its values after the scores, and its queries again, for want of registers."""
        return self.step_words > MAX_STEP_WORDS

    # --- shared memory: query rows or new vectors in bfloat16, softmax sums of each warp, accumulators ---
    @property
    def vector_bytes(self) -> int:
        """Bytes between vectors in shared memory.

        Several tokens: an odd multiple of 64, so two rows of the same load use different banks.
        """
        size = 2 * self.key_values
        return size if self.tokens == 1 else size + (64 - size) % 128

    @property
    def merged_rows(self) -> int:
        """Number of rows that a CTA merges at once."""
        return min(self.rows, OCTET)

    @property
    def softmax_base(self) -> int:
        vectors = self.vectors if self.tokens == 1 else OCTET * self.octets
        return vectors * self.vector_bytes

    @property
    def accumulator_base(self) -> int:
        return self.softmax_base + WARPS * self.merged_rows * 8

    @property
    def shared_bytes(self) -> int:
        if self.divides_shares:
            return self.slot_base + SLOT_ALIGNMENT + self.slots * self.bytes_per_slot
        return self.accumulator_base + WARPS * self.merged_rows * self.head_dim * 4

    # --- slots of shares (see ``shares``), behind the vectors: an empty share, then the slots ---
    @property
    def divides_shares(self) -> bool:
        """Whether the warps of a CTA divide the shares of several splits."""
        return self.splits_per_block > 1 and self.row_groups == 1 and self.slots >= WARPS

    @property
    def slots(self) -> int:
        """Number of slots: as many as fit and are used, one of them by the new tokens."""
        room = self.shared_limit - self.slot_base - SLOT_ALIGNMENT
        return min(room // self.bytes_per_slot, self.splits_per_block * WARPS)

    @property
    def quarters(self) -> int:
        """Number of groups of 4 accumulators of a lane: four for each chunk."""
        return 4 * (self.accumulated // CHUNK)

    @property
    def quarter_bytes(self) -> int:
        """Bytes between two quarters of a slot: 32 modulo 128."""
        size = 64 * self.rows
        return size + (32 - size) % 128

    @property
    def slot_pairs(self) -> int:
        """Offset in a slot of the pairs of running max and sum."""
        return self.quarters * self.quarter_bytes

    @property
    def bytes_per_slot(self) -> int:
        size = self.slot_pairs + 8 * self.rows
        return -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    @property
    def slot_base(self) -> int:
        return -(-self.softmax_base // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    def slot_address(self, slot: Value) -> Value:
        """Returns the offset of a slot in the shared memory of the CTA."""
        return slot * self.bytes_per_slot + (self.slot_base + SLOT_ALIGNMENT)

    def splits_in_round(self, active: int) -> int:
        """Returns the number of splits of a round, if ``active`` shares of each have positions.

        It divides ``splits_per_block``. The share of the new tokens has a slot, too.
        """
        extra = 1 if active < WARPS else 0
        n = self.splits_per_block
        return max(
            count for count in range(1, n + 1) if n % count == 0 and count * active + extra <= self.slots
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Arrays in global memory, and the shared memory of the CTA. A program gets those that it uses.

    ``T`` is the number of new tokens of each sequence.

    Attributes:
      qkv: float32 ``[partials, B * T, features]``: query, key and value heads of the new tokens, not yet
        summed.
      cos, sin: float32 ``[B * T, D / 2]``, of the rotation angles.
      q_scale, k_scale: bfloat16 ``[D]``: the norm scales of queries and keys.
      lengths: int32 ``[B]``: number of positions in the cache.
      keys, values: bfloat16 ``[B, S, kv_heads, D]``: the cache; or its pages, ``[pages, page_size, kv_heads,
        D]``. The program that prepares the new tokens writes their slots.
      pages: int32 ``[B, S / page_size]``: the pages of each row, in the order of their positions, and numbers
        from ``num_pages`` on where there is no page. None for a contiguous cache.
      queries: bfloat16 ``[B, kv_heads, T * queries_per_kv, D]``: the query rows, if T > 1.
      new_keys, new_values: bfloat16 ``[B, T, kv_heads, D]``: keys and values of the new tokens, if T > 1.
      accumulators: Output, float32 ``[B, kv_heads, splits, rows, D]``: the weighted values.
      softmax: Output, float32 ``[B, kv_heads, splits, rows, 2]``: the maximum score, and the sum of the
        weights.
      shared: The shared memory.
    """

    lengths: Any
    keys: Any
    values: Any
    qkv: Any = None
    cos: Any = None
    sin: Any = None
    q_scale: Any = None
    k_scale: Any = None
    pages: Any = None
    queries: Any = None
    new_keys: Any = None
    new_values: Any = None
    accumulators: Any = None
    softmax: Any = None
    shared: Any = None


@dataclasses.dataclass(frozen=True)
class LaneContext:
    """Indices of the lane. ``Instructions.matrix_multiply_add`` defines ``row`` and ``column``.

    ``part`` is the index of the split among those of all heads and sequences, ``first_row`` the CTA's first
    query row (None if the CTA has all rows).
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
    first_row: Value | None = None

    def shifted(self, index: Value) -> "LaneContext":
        """Returns the context of a later split of the CTA."""
        return dataclasses.replace(self, split=self.split + index, part=self.part + index)

    def query_row(self, octet: int) -> Value:
        """Returns the lane's query row in an octet of the CTA; it may exceed the last row."""
        row = self.row if octet == 0 else self.row + OCTET * octet
        return row if self.first_row is None else row + self.first_row


def lane_context(isa: Instructions, shape: Shape) -> LaneContext:
    """Computes the context of the first split of the CTA.

    Over the grid the group of query rows varies fastest, so CTAs that read the same positions run together;
    then the split, the kv head and the sequence.
    """
    thread, part, first_row = isa.thread_index(), isa.block_index(), None
    if shape.row_groups > 1:
        first_row, part = part % shape.row_groups * (OCTET * shape.octets), part // shape.row_groups
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
        first_row=first_row,
    )
