"""Prefill: reads prompts at full precision, and previews the bits that grading would have read."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding.dial import SKIPPED_POSITIONS
from grinqh_jax.decoding.thresholds import Thresholds
from grinqh_jax.model import apply
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.flat_model import FlatModel, decoder_of
from grinqh_jax.sharding.program import on_mesh
from pallas_kernels import Activations
from pallas_kernels.layout import DIGIT_BITS

PREVIEW_TOKENS = 64
"""Number of trailing prompt tokens used to estimate graded bits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preview:
    """Bits that graded decoding would have read for the last tokens of a prompt.

    Attributes:
      bits: float32 ``[B, PREVIEW_TOKENS, linears]``, mean bits per weight, scales (0.125 bits) not counted;
        row b is valid for its first ``counts[b]`` tokens.
      counts: int32 ``[B]``, number of valid tokens of each row.
    """

    bits: Float[Array, "b s linears"]
    counts: Int[Array, "b"]


@jax.jit(donate_argnames="cache")
@on_mesh
def prefill(
    model: Decoder | FlatModel, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], cache: KVCache
) -> tuple[Float[Array, "b v"], KVCache]:
    """Reads new tokens at full precision, in one pass.

    Args:
      model: Dense or graded model.
      tokens: New tokens, right-padded with any valid token.
      lengths: Number of new tokens of each row, at most t and at most the free slots of the cache.
      cache: Keys and values of the earlier tokens. A long prompt may come in several calls.

    Returns:
      float32 logits after the last new token of each row (undefined for a row without new tokens), and the
      cache.
    """
    logits, _, cache = _prefill(decoder_of(model), tokens, lengths, cache, apply.Dense())
    return logits, cache


@jax.jit(donate_argnames="cache")
@on_mesh
def prefill_with_preview(
    model: Decoder | FlatModel,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds,
) -> tuple[Float[Array, "b v"], KVCache, Preview]:
    """Runs ``prefill`` and counts the bits that graded decoding would have read.

    Args:
      model: Graded model.
      tokens, lengths, cache: As in ``prefill``.
      thresholds: Thresholds of each row, by layer name.

    Returns:
      Logits and cache as ``prefill`` does, and the preview of the last new tokens of each row.

    Raises:
      ValueError: The model is dense.
    """
    model = decoder_of(model)
    if not model.graded:
        raise ValueError("a dense model has nothing to preview; use prefill")
    start = jnp.maximum(jnp.maximum(lengths - PREVIEW_TOKENS, SKIPPED_POSITIONS - cache.lengths), 0)
    positions = jnp.minimum(start[:, None] + jnp.arange(PREVIEW_TOKENS), tokens.shape[1] - 1)
    strategy = apply.Previewing(thresholds, positions)
    logits, x, cache = _prefill(model, tokens, lengths, cache, strategy)
    for name in model.lm_head.names:
        strategy.observe(name, x)
    by_name = strategy.bits
    bits = jnp.stack([by_name[name] for name in linear_names(model.config)], axis=-1)
    return logits, cache, Preview(bits, jnp.maximum(lengths - start, 0))


@jax.jit
def merge_previews(earlier: Preview, later: Preview) -> Preview:
    """Selects, for each row, the preview of more tokens, or the later one if both have equally many."""
    use_later = later.counts >= earlier.counts
    bits = jnp.where(use_later[:, None, None], later.bits, earlier.bits)
    return Preview(bits, jnp.where(use_later, later.counts, earlier.counts))


def _prefill(
    model: Decoder, tokens: jax.Array, lengths: jax.Array, cache: KVCache, strategy: apply.Dense
) -> tuple[Float[Array, "b v"], Float[Array, "b t d"], KVCache]:
    """Returns the logits of ``prefill``, the hidden states of all tokens, and the cache."""
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, layers = model.hidden(tokens, positions, strategy, cache.layers_for(lengths))
    x = hidden.array
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return full_logits(model, last), x, cache.updated(layers, cache.lengths + lengths)


def full_logits(model: Decoder, x: Float[Array, "b d"]) -> Float[Array, "b v"]:
    """Returns the logits of a few hidden states at full precision."""
    head: apply.Apply = apply.Dense()
    if model.graded:
        # Reads all bits of the head without dequantizing it, which would make the largest array.
        read_all = jnp.zeros(model.full_bits // DIGIT_BITS, jnp.float32)
        head = apply.Graded(dict.fromkeys(model.lm_head.names, read_all))
    return model.logits(Activations.of(x), head)
