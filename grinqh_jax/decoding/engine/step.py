"""A decode step: reads one or a few new tokens of every row, graded, and counts the bits read."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.decoding.thresholds import Thresholds
from grinqh_jax.model import apply
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, linear_names
from pallas_kernels import GradingStats


def decode_step(
    model: Decoder,
    tokens: Int[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds | None,
    active: Bool[Array, "b"] | None = None,
) -> tuple[Float[Array, "b v"], KVCache, GradingStats | None]:
    """Reads one token of every row, graded.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      tokens: One token per row.
      cache: Keys and values of the earlier tokens.
      thresholds: Thresholds of each row, by layer name.
      active: Rows that advance, by default all. The cache of other rows stays the same, and their logits are
        undefined.

    Returns:
      float32 logits of the next token, the cache, and the grading statistics ``[B, linears]`` (None for a
      dense model).
    """
    outputs, cache, stats = step_outputs(model, tokens, cache, thresholds, active)
    return model.lm_head.in_order(outputs), cache, stats


def step_outputs(
    model: Decoder,
    tokens: Int[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds | None,
    active: Bool[Array, "b"] | None,
    level: int | None = None,
) -> tuple[Float[Array, "b v"], KVCache, GradingStats | None]:
    """Runs ``decode_step``; returns the logits in the order of the output projection's outputs.

    Args:
      model, tokens, cache, thresholds, active: As in ``decode_step``.
      level: As in ``read_tokens``.
    """
    counts = jnp.ones_like(cache.lengths) if active is None else active.astype(jnp.int32)
    _, outputs, cache, stats = read_tokens(model, tokens[:, None], cache, thresholds, counts, level)
    return outputs[:, 0], cache, jax.tree.map(lambda positions: positions[:, 0], stats)


def read_tokens(
    model: Decoder,
    tokens: Int[Array, "b t"],
    cache: KVCache,
    thresholds: Thresholds | None,
    counts: Int[Array, "b"],
    level: int | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b t v"], KVCache, GradingStats | None]:
    """Reads new tokens of every row, each graded at its own levels. The cache is read once.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      tokens: New tokens of each row, causal among themselves. On a GPU, more than 16
        graded rows B * t take several launches for each product.
      cache: Keys and values of the earlier tokens.
      thresholds: Thresholds by layer name, ``[B, P]``, or ``[B, t, P]`` for different ones at each position.
        A position with infinite thresholds reads no weights, and its logits are undefined.
      counts: Number of tokens by which each row advances; later ones may be any valid tokens.
      level: Level at which all channels are read, for many rows; the thresholds are then not used.

    Returns:
      Hidden states after the final norm; float32 logits after every token, in the order of the output
      projection's outputs; the cache; and the grading statistics ``[B, t, linears]`` (None for a dense
      model).
    """
    graded: apply.Graded | None = None
    if level is not None:
        graded = apply.AtLevel(level)
    elif thresholds is not None:
        graded = apply.Graded(thresholds)
    strategy = graded or apply.Dense()
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    mailbox = None if cache.mailbox is None else cache.mailbox.referenced()
    x, layers = model.hidden(tokens, positions, strategy, cache.layers_for(counts), mailbox)
    outputs = model.lm_head.outputs(x, strategy)
    cache = cache.updated(layers, cache.lengths + counts)
    if mailbox is not None:
        cache = dataclasses.replace(cache, mailbox=mailbox.frozen())
    if graded is None:
        return x.array, outputs, cache, None
    packed = _stacked_stats(model, graded).packed
    stats = GradingStats(packed.reshape(*tokens.shape, *packed.shape[1:]))
    return x.array, outputs, cache, stats


@jax.named_scope("grading_stats")
def _stacked_stats(model: Decoder, graded: apply.Graded) -> GradingStats:
    """Stacks the statistics of every position of every row to ``[rows, linears]``.

    Statistics of experts are reduced to those of tokens after they are stacked: XLA makes a kernel for every
    reduction.
    """
    names, stats = linear_names(model.config), graded.stats
    of_experts = [name for name in names if name in graded.of_experts]
    others = [name for name in names if name not in graded.of_experts]
    packed = jnp.stack([stats[name].packed.reshape(-1, 2) for name in others], axis=1)
    if not of_experts:
        return GradingStats(packed)
    of_rows = (stats[name].packed for name in of_experts)
    stacked = GradingStats(jnp.stack([rows.reshape(-1, *rows.shape[-2:]) for rows in of_rows], axis=1))
    packed = jnp.concatenate([packed, stacked.of_tokens().packed], axis=1)
    index = {name: i for i, name in enumerate(others + of_experts)}
    return GradingStats(packed[:, jnp.asarray([index[name] for name in names])])
