"""States of a fixed size: those of layers that need not keep the whole context.

A gated delta net has a recurrent state, a layer with a window a ring. Neither tells the state after fewer
tokens, so no text can start from a prefix of another one. Each row of a batch has its states; pages do not
hold them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import DeltaHeads
from grinqh_jax.model.partition import AXIS
from grinqh_jax.model.ring_cache import RingKeyValues, ring_slots


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

    def partition_specs(self) -> "RecurrentState":
        """Returns the cut of each array on a mesh (``sharding.program``): each device has its heads."""
        counts = None if self.counts is None else PartitionSpec()
        return RecurrentState(PartitionSpec(None, None, AXIS), PartitionSpec(None, AXIS), counts)  # type: ignore[arg-type]


FixedStates = Mapping[int, RecurrentState | RingKeyValues]
"""The state of each layer that has one of a fixed size, by index of the layer, with ``counts=None``."""


def fixed_states(
    config: ModelConfig, batch: int, dtype, ring_context: int | None
) -> dict[int, RecurrentState | RingKeyValues]:
    """Returns the states of a fixed size before the first token.

    Args:
      config: Configuration of the model.
      batch: Number of rows.
      dtype: Dtype of keys and values.
      ring_context: Largest number of tokens of a text, if layers with windows keep rings; None if they keep
        the whole context, like other layers with attention.
    """
    states: dict[int, RecurrentState | RingKeyValues] = {
        i: RingKeyValues.zeros(batch, slots, config.num_kv_heads, config.head_dim, dtype)
        for i, slots in _rings(config, ring_context).items()
    }
    for i, spec in enumerate(config.layers):
        if spec.delta_net is not None:
            assert config.delta_heads is not None, "gated delta nets have heads"
            states[i] = RecurrentState.zeros(config.delta_heads, batch)
    return states


def fixed_bytes(config: ModelConfig, dtype, ring_context: int | None) -> int:
    """Returns the size of the ``fixed_states`` of a text."""
    states = jax.eval_shape(lambda: fixed_states(config, 1, dtype, ring_context))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))


def whole_layers(config: ModelConfig, ring_context: int | None) -> int:
    """Returns the number of layers that keep keys and values of the whole context (see ``fixed_states``)."""
    attention = sum(spec.attention is not None for spec in config.layers)
    return attention - len(_rings(config, ring_context))


def _rings(config: ModelConfig, ring_context: int | None) -> dict[int, int]:
    """Returns the number of slots of each layer that keeps a ring.

    If all layers have windows, the last one keeps the whole context, because a cache has the size of these
    layers.
    """
    if ring_context is None:
        return {}
    attention = {i: spec.attention for i, spec in enumerate(config.layers) if spec.attention is not None}
    slots = {i: ring_slots(layer.window) for i, layer in attention.items() if layer.window is not None}
    rings = {i: size for i, size in slots.items() if size < ring_context}
    if len(rings) == len(attention):
        del rings[max(rings)]
    return rings
