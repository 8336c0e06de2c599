"""The cache of a batch of sequences, donated from step to step.

Attention has keys and values: preallocated, one slot per position, contiguous or in pages. Other layers have
states of a fixed size (``fixed_states``).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.fixed_states import FixedStates, RecurrentState, fixed_states, whole_layers
from grinqh_jax.model.partition import AXIS
from grinqh_jax.model.ring_cache import RingKeyValues
from pallas_kernels.exchange import Mailbox


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
        """Returns the cache with ``[b, t, kv_heads, head_dim]`` at positions; drops those without a slot.

        The positions of a row differ, and no two rows may write to the same page.
        """
        row, slot = self._places(positions)

        def written(cached: jax.Array, new: jax.Array) -> jax.Array:
            # If places might be equal, XLA would write 16-bit numbers by compare-and-swap, which takes three
            # to five times as long.
            return cached.at[row, slot].set(new.astype(cached.dtype), mode="drop", unique_indices=True)

        return KeyValues(written(self.keys, keys), written(self.values, values), self.pages)

    def _places(self, positions: Int[Array, "b t"]) -> tuple[Int[Array, "b #t"], Int[Array, "b t"]]:
        """Returns row or page, and slot, of positions. All places differ, also those that do not exist."""
        row = jnp.arange(len(positions))[:, None]
        if self.pages is None:
            return row, positions
        page_size = self.keys.shape[1]
        page = self.pages.at[row, positions // page_size].get(mode="fill", fill_value=len(self.keys))
        nowhere = len(self.keys) + jnp.arange(positions.size).reshape(positions.shape)
        return jnp.where(page < len(self.keys), page, nowhere), positions % page_size

    def cleared(self, lengths: Int[Array, "b"]) -> "KeyValues":
        """Returns the cache with keys and values of zero from ``lengths`` on, if no two rows share a page.

        An earlier text of the row may have left numbers there that are not finite. A weight of 0 does not
        remove such a value, nor an added mask such a score. With more pages for each row the cache stays as
        it is, because ``contiguous`` clears its copy.
        """
        if self.pages is not None and self.pages.shape[1] > 1:
            return self
        valid = (jnp.arange(self.values.shape[1]) < lengths[:, None])[..., None, None]

        def with_zeros(cached: jax.Array) -> jax.Array:
            if self.pages is None:
                return jnp.where(valid, cached, 0)
            page = self.pages[:, 0]
            rows = jnp.where(valid, cached.at[page].get(mode="fill", fill_value=0), 0)
            return cached.at[page].set(rows, mode="drop")

        return KeyValues(with_zeros(self.keys), with_zeros(self.values), self.pages)

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


LayerState = KeyValues | RingKeyValues | RecurrentState
"""The state of a layer: keys and values of attention, or the state of a gated delta net."""


def rollback_lacks(config: ModelConfig) -> str | None:
    """Returns what of a model ``KVCache.rollback`` cannot undo, or None."""
    return None if config.delta_heads is None else "recurrent states"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The states of all layers for a batch of sequences.

    Attributes:
      keys, values: One array for each layer that keeps the whole context, in the compute dtype (see
        ``KeyValues``). In row b, slots from ``lengths[b]`` on are padding that no token attends to.
      lengths: int32 ``[B]``, number of tokens in each row.
      pages: int32 ``[B, pages_per_row]``, pages of each row, the same in all layers; None for a contiguous
        cache.
      fixed: States of the other layers.
      mailbox: Memory for the exchanges of a decode step on a mesh, inside a program (``Partition.opened``).
    """

    keys: tuple[Float[Array, "rows s kv_heads head_dim"], ...]
    values: tuple[Float[Array, "rows s kv_heads head_dim"], ...]
    lengths: Int[Array, "b"]
    pages: Int[Array, "b pages_per_row"] | None = None
    fixed: FixedStates = dataclasses.field(default_factory=dict)
    mailbox: Mailbox | None = None

    @classmethod
    def create(cls, config: ModelConfig, batch: int, capacity: int, dtype) -> "KVCache":
        """Creates an empty contiguous cache with ``capacity`` slots for each of ``batch`` rows.

        Layers with windows keep rings, if these are smaller.
        """
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def empty_layers():
            return tuple(jnp.zeros(shape, dtype) for _ in range(whole_layers(config, capacity)))

        lengths = jnp.zeros(batch, jnp.int32)
        fixed = fixed_states(config, batch, dtype, capacity)
        return cls(empty_layers(), empty_layers(), lengths, fixed=fixed)

    @property
    def capacity(self) -> int:
        """Number of slots of each row."""
        slots = self.keys[0].shape[1]
        return slots if self.pages is None else slots * self.pages.shape[1]

    @property
    def layers(self) -> list[LayerState]:
        """State of each layer, if all new tokens count (see ``layers_for``)."""
        return self.layers_for(None)

    def layers_for(self, counts: Int[Array, "b"] | None) -> list[LayerState]:
        """Returns the state of each layer.

        Args:
          counts: Number of the new tokens of each row that are not padding; None if all are not.
        """
        whole = iter(zip(self.keys, self.values, strict=True))
        return [
            self.fixed[i]._replace(counts=counts) if i in self.fixed else KeyValues(*next(whole), self.pages)
            for i in range(len(self.keys) + len(self.fixed))
        ]

    def partition_specs(self) -> "KVCache":
        """Returns the cut of each array on a mesh (``sharding.program``): each device has its kv heads."""
        heads, whole = PartitionSpec(None, None, AXIS), PartitionSpec()
        keys, pages = tuple(heads for _ in self.keys), None if self.pages is None else whole
        fixed = {i: state.partition_specs() for i, state in self.fixed.items()}
        return KVCache(keys, keys, whole, pages, fixed)  # type: ignore[arg-type]

    def updated(self, layers: Sequence[LayerState], lengths: Int[Array, "b"]) -> "KVCache":
        """Returns a cache with new contents and lengths."""
        whole = [layer for layer in layers if isinstance(layer, KeyValues)]
        fixed = {
            i: layer._replace(counts=None)
            for i, layer in enumerate(layers)
            if not isinstance(layer, KeyValues)
        }
        keys, values, _ = zip(*whole, strict=True)
        return KVCache(keys, values, lengths, self.pages, fixed, self.mailbox)

    def rollback(self, lengths: Int[Array, "b"]) -> "KVCache":
        """Returns a cache as if only the first ``lengths`` tokens of each row had been read.

        No token attends to the slots after them, and later tokens overwrite these slots. Rings can take back
        ``ring_cache.SPARE_SLOTS`` tokens; recurrent states cannot be rolled back.
        """
        recurrent = [state for state in self.fixed.values() if isinstance(state, RecurrentState)]
        assert not recurrent, "recurrent states cannot be rolled back"
        return dataclasses.replace(self, lengths=lengths)
