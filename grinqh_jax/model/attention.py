"""Causal grouped-query attention, within a sequence or against a KV cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.model import rope
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.norm import rms_norm
from pallas_kernels import Activations, decode_attention

KeyValues = tuple[Float[Array, "b s kv_heads head_dim"], Float[Array, "b s kv_heads head_dim"]]
"""Keys and values of one layer."""


@jax.named_scope("attention")
def attend_heads(
    config: ModelConfig,
    qkv: Activations,
    norm_scales: tuple[Float[Array, "head_dim"], Float[Array, "head_dim"]] | None,
    positions: Int[Array, "b t"],
    cache: KeyValues | None = None,
) -> tuple[Activations, KeyValues]:
    """Computes head norms, rotation and attention, in two kernels for a decode step on a GPU.

    Args:
      config: Configuration of the model.
      qkv: Query heads, key heads and value heads of the new tokens, side by side, ``[b, t, all_heads_d]``.
      norm_scales: Scales of the query norm and the key norm, or None for models without these norms.
      positions, cache: See ``attend``.

    Returns:
      ``(outputs [b, t, heads_d], (keys, values))``: the heads side by side; keys and values as in ``attend``.
    """
    batch, tokens = positions.shape
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    frequencies = rope.inverse_frequencies(config.rope, head_dim)
    if cache is not None:
        sizes = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        if decode_attention.supports(**sizes, dtype=cache[0].dtype) is None:
            cos, sin = rope.cos_sin(positions[:, 0], frequencies)
            attended, keys, values = decode_attention.decode_attention(
                qkv, cos, sin, norm_scales, config.rms_norm_eps, *cache, positions[:, 0]
            )
            return attended, (keys, values)
    all_heads = qkv.array.reshape(batch, tokens, -1, head_dim)
    rotated, values = jnp.split(all_heads, (heads + kv_heads,), axis=2)  # rotated: query and key heads
    if norm_scales is not None:
        is_query = jnp.arange(heads + kv_heads)[:, None] < heads
        query_scale, key_scale = norm_scales
        rotated = rms_norm(rotated, jnp.where(is_query, query_scale, key_scale), config.rms_norm_eps)
    rotated = rope.rotate(rotated, positions, frequencies)
    queries, keys = jnp.split(rotated, (heads,), axis=2)
    outputs, cache = attend(queries, keys, values, positions, cache)
    return Activations.of(outputs.reshape(batch, tokens, -1)), cache


def attend(
    queries: Float[Array, "b t heads head_dim"],
    keys: Float[Array, "b t kv_heads head_dim"],
    values: Float[Array, "b t kv_heads head_dim"],
    positions: Int[Array, "b t"],
    cache: KeyValues | None = None,
) -> tuple[Float[Array, "b t heads head_dim"], KeyValues]:
    """Attends from every query to all positions up to its own, with a softmax in float32.

    Args:
      queries, keys, values: Heads of the new tokens; ``heads / kv_heads`` consecutive query heads share a kv
        head.
      positions: Positions of the new tokens in their sequence.
      cache: Keys and values of the earlier tokens; slot = position. The new tokens are written at their
        positions; those beyond the last slot are dropped. No query sees the slots beyond its position, so
        these may hold any finite values. None if the new tokens are the whole sequence.

    Returns:
      ``(outputs, (keys, values))``: keys and values are the updated cache, or those of the new tokens.
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
