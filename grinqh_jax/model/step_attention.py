"""Attention of a decode step to a KV cache, row by row and block by block as suits a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.model.cache import KeyValues

BLOCK = 128
"""Least number of positions that are handled together."""


def attend_by_blocks(
    queries: Float[Array, "b t heads head_dim"],
    cache: KeyValues,
    positions: Int[Array, "b t"],
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> Float[Array, "b t heads head_dim"]:
    """Attends from few queries of each row to the positions up to their own, with a softmax in float32.

    Works on one query, one kv head and one block at a time, so that a query's result does not depend on
    other queries, and reads the blocks of a row up to its position only. A step thus takes no longer because
    the cache has room for longer texts, and no page is copied before it is used. The number of blocks is
    known to the device alone; a GPU would have to send it to the host.

    Args:
      queries: Query heads; ``heads / kv_heads`` consecutive ones share a kv head.
      cache: Keys and values, those at ``positions`` included. Later positions may hold any values, NaN too.
      positions: Positions of the queries. A row whose position is beyond the last slot reads nothing, and its
        output is zero.
      window: Number of last positions that a query sees, its own included; None for all.
      soft_cap: Limit of the scores; None for none (see ``layer_spec.Attention``).
      sinks: Sink of each query head, a score without a value; None for none.
    """
    batch, tokens, heads, head_dim = queries.shape
    page_size, kv_heads = cache.keys.shape[1:3]
    shared = heads // kv_heads
    if cache.pages is None:
        block, capacity = min(BLOCK, page_size), page_size
    else:
        block, capacity = page_size * max(1, BLOCK // page_size), page_size * cache.pages.shape[1]

    def one_head(inputs):
        row, head, queries, position, *sinks_of_head = inputs  # [], [], [shared, head_dim], [], [shared]

        def attend_block(index, state):
            largest, total, mixed = state
            start = index * block
            keys, values, first = _load(cache, row, head, start, block)
            slots = first + jnp.arange(block)
            visible = (slots >= start) & (slots <= position)
            if window is not None:
                visible &= position - slots < window
            keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
            scores = jnp.matmul(queries, keys.T, preferred_element_type=jnp.float32) * head_dim**-0.5
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            scores = jnp.where(visible, scores, -jnp.inf)
            larger = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - larger[:, None])
            factor = jnp.exp(largest - larger)
            values = jnp.where(visible[:, None], values, 0)  # A weight of 0 does not remove NaN.
            more = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            return larger, total * factor + jnp.sum(weights, axis=-1), mixed * factor[:, None] + more

        if sinks_of_head:  # Scores before all others.
            largest, total = sinks_of_head[0].astype(jnp.float32), jnp.ones(shared, jnp.float32)
        else:
            largest = jnp.full(shared, jnp.finfo(jnp.float32).min)
            total = jnp.zeros(shared, jnp.float32)
        empty = largest, total, jnp.zeros((shared, head_dim), jnp.float32)
        begin = 0 if window is None else jnp.maximum(position - window + 1, 0) // block
        end = jnp.where(position < capacity, position // block + 1, 0)
        _, total, mixed = jax.lax.fori_loop(begin, end, attend_block, empty)
        return (mixed / jnp.where(total > 0, total, 1)[:, None]).astype(queries.dtype)

    each = jnp.arange(batch * tokens * kv_heads)
    rows, kv_head = each // (tokens * kv_heads), each % kv_heads
    by_head = queries.reshape(-1, shared, head_dim)
    inputs: tuple[jax.Array, ...] = rows, kv_head, by_head, jnp.repeat(positions.reshape(-1), kv_heads)
    if sinks is not None:
        inputs += (sinks.reshape(kv_heads, shared)[kv_head],)
    return jax.lax.map(one_head, inputs).reshape(queries.shape)


def _load(
    cache: KeyValues, row: Int[Array, ""], head: Int[Array, ""], start: Int[Array, ""], block: int
) -> tuple[Float[Array, "block d"], Float[Array, "block d"], Int[Array, ""]]:
    """Returns keys and values of a block of one head, and their first position.

    That is ``start``, or less if a contiguous cache ends within the block.
    """
    page_size, _, head_dim = cache.keys.shape[1:]
    if cache.pages is None:
        first = jnp.minimum(start, page_size - block)

        def load(array):
            return jax.lax.dynamic_slice(array, (row, first, head, 0), (1, block, 1, head_dim))

        return load(cache.keys).reshape(block, -1), load(cache.values).reshape(block, -1), first
    entries = start // page_size + jnp.arange(block // page_size)
    pages = cache.pages.at[row, entries].get(mode="clip")

    def gather(array):
        size = (1, page_size, 1, head_dim)
        parts = [jax.lax.dynamic_slice(array, (page, 0, head, 0), size) for page in pages]
        return jnp.concatenate(parts, axis=1).reshape(block, -1)

    return gather(cache.keys), gather(cache.values), start
