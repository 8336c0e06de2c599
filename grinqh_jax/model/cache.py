"""The cache of a batch of sequences, donated from step to step.

Attention has keys and values: preallocated, one slot per position, contiguous or in pages. A layer with a
recurrent state has one state for each row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import DeltaHeads
from grinqh_jax.model.partition import AXIS


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

    def cleared(self, lengths: Int[Array, "b"]) -> "KeyValues":
        """Returns the cache with values of zero from ``lengths`` on, if no two rows share a page.

        An earlier text of the row may have left values there that are not finite, which a weight of 0 does
        not remove. With more pages for each row the cache stays as it is, because ``contiguous`` clears its
        copy.
        """
        if self.pages is not None and self.pages.shape[1] > 1:
            return self
        valid = (jnp.arange(self.values.shape[1]) < lengths[:, None])[..., None, None]
        if self.pages is None:
            return self._replace(values=jnp.where(valid, self.values, 0))
        page = self.pages[:, 0]
        values = jnp.where(valid, self.values.at[page].get(mode="fill", fill_value=0), 0)
        return self._replace(values=self.values.at[page].set(values, mode="drop"))

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


class RecurrentState(NamedTuple):
    """State of one gated delta net after the earlier tokens of each row (``delta_net``).

    Attributes:
      convolution: float32, the last inputs of the convolution, oldest first.
      memory: float32, a matrix from keys to values for each value head.
      counts: int32 ``[B]``, number of the new tokens that change the state: the first ones of each row. The
        others are padding. None if all do.
    """

    convolution: Float[Array, "b w1 channels"]
    memory: Float[Array, "b heads dk dv"]
    counts: Int[Array, "b"] | None = None

    @classmethod
    def zeros(cls, heads: DeltaHeads, batch: int) -> "RecurrentState":
        """Returns the state before the first token."""
        return cls(
            jnp.zeros((batch, heads.convolution_width - 1, heads.channels), jnp.float32),
            jnp.zeros((batch, heads.value_heads, heads.key_dim, heads.value_dim), jnp.float32),
        )


LayerState = KeyValues | RecurrentState
"""The state of a layer: keys and values of attention, or that of a gated delta net."""

RecurrentStates = Mapping[int, RecurrentState]
"""The recurrent state of each layer that has one, by index of the layer, with ``counts=None``."""


def no_tokens(config: ModelConfig, batch: int) -> dict[int, RecurrentState]:
    """Returns the recurrent states before the first token."""
    if (heads := config.delta_heads) is None:
        return {}
    recurrent = [i for i, spec in enumerate(config.layers) if spec.delta_net is not None]
    return {i: RecurrentState.zeros(heads, batch) for i in recurrent}


def recurrent_bytes(config: ModelConfig) -> int:
    """Returns the size of the recurrent states of a text."""
    states = jax.eval_shape(lambda: no_tokens(config, 1))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))


def attention_layers(config: ModelConfig) -> int:
    """Returns the number of layers that have keys and values."""
    return sum(spec.attention is not None for spec in config.layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The states of all layers for a batch of sequences.

    Attributes:
      keys, values: One array for each layer with attention, in the compute dtype (see ``KeyValues``). In row
        b, slots from ``lengths[b]`` on are padding that no token attends to.
      lengths: int32 ``[B]``, number of tokens in each row.
      pages: int32 ``[B, pages_per_row]``, pages of each row, the same in all layers; None for a contiguous
        cache.
      recurrent: States of the layers with a recurrent state.
    """

    keys: tuple[Float[Array, "rows s kv_heads head_dim"], ...]
    values: tuple[Float[Array, "rows s kv_heads head_dim"], ...]
    lengths: Int[Array, "b"]
    pages: Int[Array, "b pages_per_row"] | None = None
    recurrent: RecurrentStates = dataclasses.field(default_factory=dict)

    @classmethod
    def create(cls, config: ModelConfig, batch: int, capacity: int, dtype) -> "KVCache":
        """Creates an empty contiguous cache with ``capacity`` slots for each of ``batch`` rows."""
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def empty_layers():
            return tuple(jnp.zeros(shape, dtype) for _ in range(attention_layers(config)))

        lengths = jnp.zeros(batch, jnp.int32)
        return cls(empty_layers(), empty_layers(), lengths, recurrent=no_tokens(config, batch))

    @property
    def capacity(self) -> int:
        """Number of slots of each row."""
        slots = self.keys[0].shape[1]
        return slots if self.pages is None else slots * self.pages.shape[1]

    @property
    def layers(self) -> list[LayerState]:
        """State of each layer, if all new tokens count (see ``RecurrentState.counts``)."""
        return self.layers_for(None)

    def layers_for(self, counts: Int[Array, "b"] | None) -> list[LayerState]:
        """Returns the state of each layer.

        Args:
          counts: Number of the new tokens of each row that are not padding; None if all are not.
        """
        attention = iter(zip(self.keys, self.values, strict=True))
        return [
            self.recurrent[i]._replace(counts=counts)
            if i in self.recurrent
            else KeyValues(*next(attention), self.pages)
            for i in range(len(self.keys) + len(self.recurrent))
        ]

    def partition_specs(self) -> "KVCache":
        """Returns the cut of each array on a mesh (``sharding.program``): each device has its kv heads."""
        heads, whole = PartitionSpec(None, None, AXIS), PartitionSpec()
        keys, pages = tuple(heads for _ in self.keys), None if self.pages is None else whole
        recurrent = jax.tree.map(lambda state: whole, self.recurrent)
        return KVCache(keys, keys, whole, pages, recurrent)  # type: ignore[arg-type]

    def updated(self, layers: Sequence[LayerState], lengths: Int[Array, "b"]) -> "KVCache":
        """Returns a cache with new contents and lengths."""
        attention = [layer for layer in layers if isinstance(layer, KeyValues)]
        recurrent = {
            i: layer._replace(counts=None)
            for i, layer in enumerate(layers)
            if isinstance(layer, RecurrentState)
        }
        keys, values, _ = zip(*attention, strict=True)
        return KVCache(keys, values, lengths, self.pages, recurrent)
