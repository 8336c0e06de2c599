"""The KV cache: preallocated, one slot per position, contiguous or in pages, donated from step to step."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.model.config import ModelConfig


class KeyValues(NamedTuple):
    """Keys and values of one layer, and where each row of the batch has them.

    Attributes:
      keys, values: ``[B, S, kv_heads, head_dim]``, slot = position; or, with ``pages``, the pages of all rows
        ``[pages, page_size, kv_heads, head_dim]``.
      pages: int32 ``[B, pages_per_row]``, pages of each row in the order of their positions. An entry from
        the number of pages on is no page: what is written there is dropped. None for a contiguous cache.
    """

    keys: Float[Array, "rows s kv_heads head_dim"]
    values: Float[Array, "rows s kv_heads head_dim"]
    pages: Int[Array, "b pages_per_row"] | None = None

    def write(self, positions: Int[Array, "b t"], keys: jax.Array, values: jax.Array) -> "KeyValues":
        """Returns the cache with ``[b, t, kv_heads, head_dim]`` at positions; drops those without a slot."""
        row, slot = jnp.arange(len(positions))[:, None], positions
        if self.pages is not None:
            page_size = self.keys.shape[1]
            row = self.pages.at[row, positions // page_size].get(mode="fill", fill_value=len(self.keys))
            slot = positions % page_size

        def written(cached: jax.Array, new: jax.Array) -> jax.Array:
            return cached.at[row, slot].set(new.astype(cached.dtype), mode="drop")

        return KeyValues(written(self.keys, keys), written(self.values, values), self.pages)

    def contiguous(self, lengths: Int[Array, "b"]) -> "KeyValues":
        """Returns a contiguous cache of the same rows, a copy if there are pages.

        The copy has zeros from ``lengths`` on, because another text may have left numbers there that are not
        finite.
        """
        if self.pages is None:
            return self
        slots = self.pages.shape[1] * self.keys.shape[1]
        valid = (jnp.arange(slots) < lengths[:, None])[..., None, None]

        def rows(paged):
            # Zeros for the pages that a row does not have.
            gathered = paged.at[self.pages].get(mode="fill", fill_value=0)
            return jnp.where(valid, gathered.reshape(len(lengths), slots, *paged.shape[2:]), 0)

        return KeyValues(rows(self.keys), rows(self.values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer for a batch of sequences.

    Attributes:
      keys, values: One array for each layer, in the compute dtype (see ``KeyValues``). In row b, slots from
        ``lengths[b]`` on are padding that no token attends to.
      lengths: int32 ``[B]``, number of tokens in each row.
      pages: int32 ``[B, pages_per_row]``, pages of each row, the same in all layers; None for a contiguous
        cache.
    """

    keys: tuple[Float[Array, "rows s kv_heads head_dim"], ...]
    values: tuple[Float[Array, "rows s kv_heads head_dim"], ...]
    lengths: Int[Array, "b"]
    pages: Int[Array, "b pages_per_row"] | None = None

    @classmethod
    def create(cls, config: ModelConfig, batch: int, capacity: int, dtype) -> "KVCache":
        """Creates an empty contiguous cache with ``capacity`` slots for each of ``batch`` rows."""
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def empty_layers():
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(empty_layers(), empty_layers(), jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Number of slots of each row."""
        slots = self.keys[0].shape[1]
        return slots if self.pages is None else slots * self.pages.shape[1]

    @property
    def layers(self) -> list[KeyValues]:
        """Keys and values of each layer."""
        layers = zip(self.keys, self.values, strict=True)
        return [KeyValues(keys, values, self.pages) for keys, values in layers]

    def updated(self, layers: Sequence[KeyValues], lengths: Int[Array, "b"]) -> "KVCache":
        """Returns a cache with new contents and lengths."""
        keys, values, _ = zip(*layers, strict=True)
        return KVCache(keys, values, lengths, self.pages)
