"""Causal grouped-query attention, within a sequence or against a key-value cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

KeyValues = tuple[Float[Array, "b s kv_heads d"], Float[Array, "b s kv_heads d"]]
"""Keys and values of one layer."""


def attend(
    queries: Float[Array, "b t heads d"],
    keys: Float[Array, "b t kv_heads d"],
    values: Float[Array, "b t kv_heads d"],
    positions: Int[Array, "b t"],
    cache: KeyValues | None = None,
) -> tuple[Float[Array, "b t heads d"], KeyValues]:
    """Attention of every query to the positions up to its own. Softmax in float32.

    Args:
      queries, keys, values: of the new tokens; consecutive groups of query heads share a kv head.
      positions: of the new tokens in their sequence.
      cache: keys and values of the earlier tokens, slot = position. The new ones are written at
        their positions (those beyond the last slot are dropped). Slots beyond a query's position are
        never seen, so they may hold anything finite. None: the new tokens are the whole sequence.

    Returns:
      ``(outputs, (keys, values))``, the latter as attended to: the updated cache, if there is one.
    """
    if cache is None:
        slots = positions
    else:
        row = jnp.arange(len(positions))[:, None]
        keys = cache[0].at[row, positions].set(keys.astype(cache[0].dtype), mode="drop")
        values = cache[1].at[row, positions].set(values.astype(cache[1].dtype), mode="drop")
        slots = jnp.arange(keys.shape[1])[None]
    visible: Bool[Array, "b 1 t s"] = slots[:, None, None, :] <= positions[:, None, :, None]
    outputs = jax.nn.dot_product_attention(
        queries, keys.astype(queries.dtype), values.astype(queries.dtype), mask=visible
    )
    return outputs, (keys, values)
