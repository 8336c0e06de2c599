"""Causal attention within whole sequences, without a KV cache, block by block as suits a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 256
"""Number of queries that are handled together. Their scores fit the cache of a CPU, and keys after the last
of these queries are left out of the product: a sequence of 1,024 tokens takes a fifth of the time of one
product for all queries (two CPU cores, jax 0.10.2)."""


def blockwise(
    queries: Float[Array, "b t heads head_dim"],
    keys: Float[Array, "b t kv_heads head_dim"],
    values: Float[Array, "b t kv_heads head_dim"],
    positions: Int[Array, "b t"],
    window: int | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> Float[Array, "b t heads head_dim"]:
    """Attends from every query to the positions up to its own, with a softmax in float32.

    Works on one kv head and ``QUERY_BLOCK`` queries at a time.

    Args:
      queries, keys, values: Heads of the tokens; ``heads / kv_heads`` consecutive query heads share a kv
        head.
      positions: Positions of the tokens in their sequence, ascending.
      window: Number of last positions that a query sees, its own included; None for all.
      sinks: Sink of each query head, a score without a value; None for none.
    """
    batch, tokens, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    shared = heads // kv_heads
    by_head = queries.reshape(batch, tokens, kv_heads, shared, head_dim).transpose(0, 2, 3, 1, 4)

    def one_head(inputs):
        # [shared, t, head_dim], [t, head_dim] twice, [t], [shared, 1, 1]
        queries, keys, values, positions, *sinks_of_head = inputs
        blocks = []
        for start in range(0, tokens, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, tokens)
            rows = queries[:, start:stop].reshape(-1, head_dim)
            scores = jnp.matmul(rows, keys[:stop].T, preferred_element_type=jnp.float32)
            scores = scores.reshape(shared, stop - start, stop) * head_dim**-0.5
            distance = positions[start:stop, None] - positions[:stop]
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            weights = softmax_with_sinks(jnp.where(visible, scores, -jnp.inf), *sinks_of_head)
            weights = weights.astype(values.dtype)
            mixed = jnp.matmul(weights.reshape(-1, stop), values[:stop], preferred_element_type=jnp.float32)
            blocks.append(mixed.reshape(shared, stop - start, head_dim).astype(queries.dtype))
        return jnp.concatenate(blocks, axis=1)

    flat = (batch * kv_heads, tokens, head_dim)
    inputs: tuple[jax.Array, ...] = (
        by_head.reshape(batch * kv_heads, shared, tokens, head_dim),
        keys.swapaxes(1, 2).reshape(flat),
        values.swapaxes(1, 2).reshape(flat),
        jnp.repeat(positions, kv_heads, axis=0),
    )
    if sinks is not None:
        inputs += (jnp.tile(sinks.reshape(kv_heads, shared, 1, 1), (batch, 1, 1, 1)),)
    # A gradient computes the weights of one head again; those of all would need more memory than a layer.
    mixed = jax.lax.map(jax.checkpoint(one_head), inputs)
    mixed = mixed.reshape(batch, kv_heads, shared, tokens, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, head_dim)


def softmax_with_sinks(
    scores: Float[Array, "*rows s"], sinks: Float[Array, "*#rows 1"] | None = None
) -> Float[Array, "*rows s"]:
    """Returns the softmax over the last axis of float32 scores, without the share of the sinks.

    Args:
      scores: Scores.
      sinks: One more score of each row; None for none.
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    weights = jnp.exp(scores - largest)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - largest))
