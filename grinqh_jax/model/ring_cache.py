"""Keys and values of a layer with a window, in a ring that holds the window instead of the whole context."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from grinqh_jax.model.partition import AXIS

SPARE_SLOTS = 16
"""Number of slots of a ring beside those of the window. So many of the last tokens can be taken back
(``KVCache.rollback``), and so many new ones are written before they attend."""


NOWHERE = 2**31 - 1
"""Position of a slot without a token: larger than all positions, so that no token sees it."""


def ring_slots(window: int) -> int:
    """Returns the number of slots of a ring, a multiple of 8."""
    return -(-(window + SPARE_SLOTS) // 8) * 8


class RingKeyValues(NamedTuple):
    """Keys and values of the last positions: position p has slot ``p % slots``.

    A slot holds the largest position before the new tokens that has this slot, or an older one or one that
    was taken back, which no new token sees, because there are ``SPARE_SLOTS`` more slots than the window has.

    Attributes:
      keys, values: ``[B, slots, kv_heads, head_dim]``, in the compute dtype.
      counts: int32 ``[B]``, number of the new tokens that are written: the first ones of each row. The others
        are padding. None if all are.
    """

    keys: Float[Array, "b slots kv_heads head_dim"]
    values: Float[Array, "b slots kv_heads head_dim"]
    counts: Int[Array, "b"] | None = None

    @classmethod
    def zeros(cls, batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> "RingKeyValues":
        """Returns a ring without positions."""
        shape = batch, slots, kv_heads, head_dim
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def partition_specs(self) -> "RingKeyValues":
        """Returns the cut of each array on a mesh, as ``KVCache.partition_specs`` does."""
        heads = PartitionSpec(None, None, AXIS)
        return RingKeyValues(heads, heads, None if self.counts is None else PartitionSpec())  # type: ignore[arg-type]

    def extended(
        self,
        positions: Int[Array, "b t"],
        keys: Float[Array, "b t kv_heads head_dim"],
        values: Float[Array, "b t kv_heads head_dim"],
    ) -> tuple[jax.Array, jax.Array, Int[Array, "b s"], "RingKeyValues"]:
        """Adds new tokens at consecutive positions.

        Returns:
          ``(keys, values, positions, ring)``: keys and values that the new tokens may attend to, their
          positions (``NOWHERE``: none), and the ring with the new tokens. More than ``SPARE_SLOTS`` new
          tokens would overwrite positions that the first of them sees, so they attend to the old ring and to
          themselves.
        """
        tokens = positions.shape[1]
        ring = self._written(positions, keys, values)
        if tokens <= SPARE_SLOTS:
            return ring.keys, ring.values, self._positions(positions[:, -1]), ring
        keys = jnp.concatenate([self.keys, keys.astype(self.keys.dtype)], axis=1)
        values = jnp.concatenate([self.values, values.astype(self.values.dtype)], axis=1)
        return keys, values, jnp.concatenate([self._positions(positions[:, 0] - 1), positions], axis=1), ring

    def _positions(self, last: Int[Array, "b"]) -> Int[Array, "b slots"]:
        """Returns the position of each slot (``NOWHERE``: none) after position ``last`` was written."""
        slots = self.keys.shape[1]
        positions = last[:, None] - (last[:, None] - jnp.arange(slots)) % slots
        return jnp.where(positions < 0, NOWHERE, positions)

    def _written(self, positions: Int[Array, "b t"], keys: jax.Array, values: jax.Array) -> "RingKeyValues":
        row, slot = jnp.arange(len(positions))[:, None], self._slots(positions)

        def written(cached: jax.Array, new: jax.Array) -> jax.Array:
            # See ``KeyValues.write``.
            return cached.at[row, slot].set(new.astype(cached.dtype), mode="drop", unique_indices=True)

        return RingKeyValues(written(self.keys, keys), written(self.values, values), self.counts)

    def _slots(self, positions: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """Returns slots of new tokens. Those that are not kept get slots that do not exist. All differ."""
        batch, tokens = positions.shape
        slots, index = self.keys.shape[1], jnp.arange(tokens)
        counts = jnp.full(batch, tokens) if self.counts is None else self.counts
        is_last = (index < counts[:, None]) & (index >= counts[:, None] - slots)
        return jnp.where(is_last, positions % slots, slots + index)
