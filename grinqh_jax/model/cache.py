"""The KV cache: preallocated, one slot per position, donated from step to step."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.model.attention import KeyValues
from grinqh_jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer for a batch of sequences.

    Attributes:
      keys, values: One array ``[B, S, kv_heads, head_dim]`` for each layer, in the compute dtype; slot =
        position. In row b, slots from ``lengths[b]`` on are padding that no token attends to.
      lengths: int32 ``[B]``, number of tokens in each row.
    """

    keys: tuple[Float[Array, "b s kv_heads head_dim"], ...]
    values: tuple[Float[Array, "b s kv_heads head_dim"], ...]
    lengths: Int[Array, "b"]

    @classmethod
    def create(cls, config: ModelConfig, batch: int, capacity: int, dtype) -> "KVCache":
        """Creates an empty cache with ``capacity`` slots for each of ``batch`` rows."""
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def empty_layers():
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(empty_layers(), empty_layers(), jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Number of slots S of each row."""
        return self.keys[0].shape[1]

    @property
    def layers(self) -> list[KeyValues]:
        """Keys and values of each layer."""
        return list(zip(self.keys, self.values, strict=True))

    def updated(self, layers: Sequence[KeyValues], lengths: Int[Array, "b"]) -> "KVCache":
        """Returns a cache with new contents and lengths."""
        keys, values = zip(*layers, strict=True)
        return KVCache(keys, values, lengths)
