"""Causal grouped-query attention, within a sequence or against a key-value cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.model import rope
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.norm import rms_norm
from pallas_kernels import Activations, PartialSums, decode_attention

KeyValues = tuple[Float[Array, "b s kv_heads head_dim"], Float[Array, "b s kv_heads head_dim"]]
"""Keys and values of one layer."""


@jax.named_scope("attention")
def attend_heads(
    config: ModelConfig,
    qkv: Float[Array, "b t all_heads_d"] | PartialSums,
    norms: tuple[Float[Array, "head_dim"], Float[Array, "head_dim"]] | None,
    positions: Int[Array, "b t"],
    cache: KeyValues | None = None,
) -> tuple[Float[Array, "b t heads_d"] | Activations, KeyValues]:
    """From the projections of new tokens to what their heads attend to: norms, rotation, attention.

    One new token per sequence takes one kernel where the device has it, XLA's operations otherwise.

    Args:
      config: for the numbers of heads and the rotation.
      qkv: query heads, key heads, value heads; partial sums in a decode step on a GPU.
      norms: scales of the query and key norms, for models that have them.
      positions, cache: as in ``attend``.

    Returns:
      ``(outputs, (keys, values))``, the heads side by side; keys and values as in ``attend``.
    """
    batch, tokens = positions.shape
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    frequencies = rope.inverse_frequencies(config.rope, head_dim)
    if cache is not None:
        reason = decode_attention.supports(
            tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=cache[0].dtype
        )
        if reason is None:
            in_parts = isinstance(qkv, PartialSums)
            sums = qkv if in_parts else PartialSums(qkv.astype(jnp.float32)[None, :, 0], qkv.shape[-1])
            cos, sin = rope.cos_sin(positions[:, 0], frequencies)
            outputs, *cache = decode_attention.decode_attention(
                sums, cos, sin, norms, config.rms_norm_eps, *cache, positions[:, 0]
            )
            return outputs if in_parts else outputs.values[:, None], tuple(cache)
    if isinstance(qkv, PartialSums):
        qkv = qkv.total()[:, None].astype(cache[0].dtype)
    qkv = qkv.reshape(batch, tokens, -1, head_dim)
    rotated, values = jnp.split(qkv, (heads + kv_heads,), axis=2)
    if norms is not None:
        is_query = jnp.arange(heads + kv_heads)[:, None] < heads
        rotated = rms_norm(rotated, jnp.where(is_query, *norms), config.rms_norm_eps)
    rotated = rope.rotate(rotated, positions, frequencies)
    queries, keys = jnp.split(rotated, (heads,), axis=2)
    outputs, cache = attend(queries, keys, values, positions, cache)
    return outputs.reshape(batch, tokens, -1), cache


def attend(
    queries: Float[Array, "b t heads head_dim"],
    keys: Float[Array, "b t kv_heads head_dim"],
    values: Float[Array, "b t kv_heads head_dim"],
    positions: Int[Array, "b t"],
    cache: KeyValues | None = None,
) -> tuple[Float[Array, "b t heads head_dim"], KeyValues]:
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
