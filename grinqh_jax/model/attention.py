"""Causal grouped-query attention, within a sequence or against a KV cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.model import fused_attention, rope
from grinqh_jax.model.by_token import MOST_DECODED, by_token
from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.causal_attention import blockwise, softmax_with_sinks
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import Attention, QueryGrowth
from grinqh_jax.model.norm import rms_norm
from grinqh_jax.model.ring_cache import SPARE_SLOTS, RingKeyValues
from grinqh_jax.model.step_attention import attend_by_blocks
from pallas_kernels import Activations, decode_attention

MOST_POSITIONS = 1 << 20
"""Number of positions, more than any model has, that a ring is mapped to as a paged cache."""


@jax.named_scope("attention")
def attend_heads(
    config: ModelConfig,
    attention: Attention,
    qkv: Activations,
    norm_scales: tuple[Float[Array, "d_q"], Float[Array, "d_k"]] | None,
    positions: Int[Array, "b t"],
    cache: KeyValues | RingKeyValues | None = None,
    across: str | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> tuple[Activations, KeyValues | RingKeyValues]:
    """Computes head norms, rotation and attention, in two or three kernels for a decode step on a GPU.

    Args:
      config: Configuration of the model.
      attention: Description of the layer's attention.
      qkv: Query heads, key heads and value heads of the new tokens, side by side, ``[b, t, all_heads_d]``.
      norm_scales: Scales of the query norm and the key norm, or None for models without these norms.
      positions: Positions of the new tokens in their sequence, consecutive if there is a cache.
      cache: See ``attend``.
      across: Mesh axis among whose devices the heads of one norm are cut; None if this device has them all.
      sinks: Sink of each query head, or None (see ``layer_spec.Attention``).

    Returns:
      ``(outputs [b, t, heads_d], cache)``: the heads side by side; the cache as in ``attend``.
    """
    batch, tokens = positions.shape
    sizes = {"batch": batch, "tokens": tokens, "heads": config.num_heads, "kv_heads": config.num_kv_heads}
    options: dict[str, Any] = {
        "window": attention.window,
        "soft_cap": attention.score_soft_cap,
        "sinks": sinks,
    }
    if cache is not None and (paged := _in_pages(cache, tokens)) is not None:
        reason = decode_attention.supports(**sizes, head_dim=config.head_dim, dtype=paged.keys.dtype)
        if reason is None:
            cos, sin = _cos_sin(attention, positions, config.head_dim)
            if preparation_lacks(attention) is not None:
                prepared = _prepared(config, attention, qkv, norm_scales, positions, across, tokens=0)
                qkv = Activations.of(jnp.concatenate(prepared, axis=2).reshape(batch, tokens, -1))
                norm_scales, cos = None, jnp.ones((batch, tokens, config.head_dim // 2), jnp.float32)
                sin = jnp.zeros_like(cos)
            attended, keys, values = decode_attention.decode_attention(
                qkv,
                cos,
                sin,
                norm_scales,
                config.rms_norm_eps,
                paged.keys,
                paged.values,
                positions[:, 0],
                paged.pages,
                **options,
            )
            return attended, cache._replace(keys=keys, values=values)
    whole = tokens if cache is None else 0
    queries, keys, values = _prepared(config, attention, qkv, norm_scales, positions, across, whole)
    outputs, updated = attend(queries, keys, values, positions, cache, **options)
    return Activations.of(outputs.reshape(batch, tokens, -1)), updated


def _in_pages(cache: KeyValues | RingKeyValues, tokens: int) -> KeyValues | None:
    """Returns a cache as keys and values by position; None for a ring with too many new tokens.

    A ring is a page that holds the positions of every entry of its row's page table. Of those that it no
    longer holds, none is in a window.
    """
    if isinstance(cache, KeyValues):
        return cache
    if tokens > SPARE_SLOTS:
        return None
    rows, slots = cache.keys.shape[:2]
    pages = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, -(-MOST_POSITIONS // slots)))
    return KeyValues(cache.keys, cache.values, pages)


def _prepared(
    config: ModelConfig,
    attention: Attention,
    qkv: Activations,
    norm_scales: tuple[Float[Array, "d_q"], Float[Array, "d_k"]] | None,
    positions: Int[Array, "b t"],
    across: str | None,
    tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values ``[b, t, heads, head_dim]`` after norms and rotation.

    ``tokens`` is the length of whole texts, and 0 if there is a cache.
    """
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    all_heads = qkv.array.reshape(*positions.shape, -1, head_dim)
    queries, keys, values = jnp.split(all_heads, (heads, heads + kv_heads), axis=2)
    if norm_scales is not None:
        queries, keys = (
            _normed(x, scale, config.rms_norm_eps, across)
            for x, scale in zip((queries, keys), norm_scales, strict=True)
        )
    if (limit := attention.qkv_limit) is not None:
        queries, keys, values = (jnp.clip(x, -limit, limit) for x in (queries, keys, values))
    cos, sin = _cos_sin(attention, positions, head_dim, tokens)
    queries, keys = (rope.rotate(x, cos, sin, _score_factor(attention, head_dim)) for x in (queries, keys))
    if attention.query_growth is not None:
        queries = queries * _growth(attention.query_growth, positions)[..., None, None].astype(queries.dtype)
    return queries, keys, values


def without_gates(
    config: ModelConfig, outputs: Activations
) -> tuple[Activations, Float[Array, "b t heads_d"]]:
    """Splits the outputs of ``qkv`` in a layer with gates, whose query heads are followed by their gates.

    Returns:
      ``(query heads, key heads and value heads side by side, gates)``.
    """
    x, queries = outputs.array, config.num_heads * config.head_dim
    pairs = x[..., : 2 * queries].reshape(*x.shape[:-1], config.num_heads, 2, config.head_dim)
    heads, gates = (pairs[..., i, :].reshape(*x.shape[:-1], queries) for i in range(2))
    return Activations.of(jnp.concatenate([heads, x[..., 2 * queries :]], axis=-1)), gates


def preparation_lacks(attention: Attention) -> str | None:
    """Returns the option of a layer for which XLA computes head norms and rotation, or None.

    The kernel of a decode step then gets prepared heads.
    """
    if attention.rope is not None and attention.rope.rotary_dim is not None:
        return "partial rotation"
    if attention.head_norms is not None and attention.head_norms[0].axis != "head":
        return "norms of all heads"
    if attention.qkv_limit is not None:
        return "limited queries, keys and values"
    if attention.query_growth is not None:
        return "queries that grow with their position"
    return None


def _score_factor(attention: Attention, head_dim: int) -> float:
    """Returns the factor of queries and keys that turns ``head_dim ** -0.5`` into ``score_scale``."""
    return 1.0 if attention.score_scale is None else (attention.score_scale * head_dim**0.5) ** 0.5


def _cos_sin(
    attention: Attention, positions: Int[Array, "*rows"], head_dim: int, tokens: int = 0
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """Returns cosine and sine of the rotation angles, times the factor of queries and keys.

    A layer without rotation has angles of 0, so the kernel runs it too. ``tokens`` is as for ``_prepared``.
    """
    factor, rotation = _score_factor(attention, head_dim), attention.rope
    if rotation is None:
        cos = jnp.full((*positions.shape, head_dim // 2), factor, jnp.float32)
        return cos, jnp.zeros_like(cos)
    frequencies = rope.inverse_frequencies(rotation, head_dim, tokens)
    return rope.cos_sin(positions, frequencies, rotation.attention_factor * factor)


def _normed(
    x: Float[Array, "b t heads d"], norm_scale: Float[Array, "n"], eps: float, across: str | None
) -> Float[Array, "b t heads d"]:
    """Normalizes each head, or all heads together if the scale has the width of all heads."""

    def normed(x):
        rows = x.reshape(*x.shape[:2], -1, len(norm_scale))
        return rms_norm(rows, norm_scale, eps, across).reshape(x.shape)

    return by_token(normed, x)


def _growth(growth: QueryGrowth, positions: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Returns the float32 factor of the queries at each position."""
    return 1 + growth.rate * jnp.log1p((positions // growth.length).astype(jnp.float32))


def attend(
    queries: Float[Array, "b t heads head_dim"],
    keys: Float[Array, "b t kv_heads head_dim"],
    values: Float[Array, "b t kv_heads head_dim"],
    positions: Int[Array, "b t"],
    cache: KeyValues | RingKeyValues | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> tuple[Float[Array, "b t heads head_dim"], KeyValues | RingKeyValues]:
    """Attends from every query to the positions up to its own, with a softmax in float32.

    Args:
      queries, keys, values: Heads of the new tokens; ``heads / kv_heads`` consecutive query heads share a kv
        head.
      positions: Positions of the new tokens in their sequence; ascending without a cache.
      cache: Keys and values of the earlier tokens; a ring only if there is a window. The new tokens are
        written at their positions; those beyond the last slot are dropped. No query sees the slots beyond its
        position. Several new tokens clear them (see ``KeyValues.cleared``); for one, they may hold any finite
        values. None if the new tokens are the whole sequence.
      window: Number of last positions that a query sees, its own included; None for all.
      soft_cap: Limit of the scores; None for none (see ``layer_spec.Attention``).
      sinks: Sink of each query head; None for none.

    Returns:
      ``(outputs, cache)``: the updated cache, or keys and values of the new tokens.
    """
    if cache is None:
        slots = positions
        if soft_cap is None and jax.default_backend() == "cpu":
            return blockwise(queries, keys, values, positions, window, sinks), KeyValues(keys, values)
        updated: KeyValues | RingKeyValues = KeyValues(keys, values)
    else:
        one_each, paged = queries.shape[1] == 1, _in_pages(cache, queries.shape[1])
        few = one_each or positions.size <= MOST_DECODED
        if paged is not None and few and jax.default_backend() == "cpu":
            written = paged.write(positions, keys, values)
            updated = cache._replace(keys=written.keys, values=written.values)
            return attend_by_blocks(queries, written, positions, window, soft_cap, sinks), updated
    lengths = None  # Slots of a ring are in no order of their positions.
    if isinstance(cache, RingKeyValues):
        keys, values, slots, updated = cache.extended(positions, keys, values)
    elif cache is not None:
        written, lengths = cache.write(positions, keys, values), positions[:, -1] + 1
        if not one_each:
            written = written.cleared(lengths)
        keys, values, _ = written.contiguous(lengths)
        slots, updated = jnp.arange(keys.shape[1])[None], written
    distance = positions[:, None, :, None] - slots[:, None, None, :]
    visible: Bool[Array, "b 1 t s"] = distance >= 0
    if window is not None:
        visible &= distance < window
    heads = queries, keys.astype(queries.dtype), values.astype(queries.dtype)
    if cache is not None and fused_attention.lacks(queries, soft_cap, sinks) is None:
        return fused_attention.attend(*heads, visible, sinks, lengths), updated
    if soft_cap is None and sinks is None:
        return jax.nn.dot_product_attention(*heads, mask=visible), updated
    return _attend_masked(*heads, visible, soft_cap, sinks), updated


def _attend_masked(
    queries: Float[Array, "b t heads d"],
    keys: Float[Array, "b s kv_heads d"],
    values: Float[Array, "b s kv_heads d"],
    visible: Bool[Array, "b 1 t s"],
    soft_cap: float | None,
    sinks: Float[Array, "heads"] | None,
) -> Float[Array, "b t heads d"]:
    """Returns what ``jax.nn.dot_product_attention`` does, with a soft cap of the scores and sinks."""
    batch, tokens, _, head_dim = queries.shape
    grouped = queries.reshape(batch, tokens, keys.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    by_head = None if sinks is None else sinks.reshape(keys.shape[2], -1, 1, 1)
    weights = softmax_with_sinks(scores, by_head).astype(queries.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, values).reshape(queries.shape)
