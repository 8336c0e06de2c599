"""Log-probabilities that a model gives to the tokens of a prompt."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from grinqh_jax.decoding.engine.prompt import full_logits
from grinqh_jax.decoding.logprobs import TokenLogprobs, token_logprobs
from grinqh_jax.model import apply
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.flat_model import FlatModel, decoder_of
from grinqh_jax.sharding.program import on_mesh

LOGPROB_ROWS = 16
"""Number of tokens of a prompt whose log-probabilities are computed together."""


@jax.jit(static_argnames="count", donate_argnames="cache")
@on_mesh
def prompt_logprobs(
    model: Decoder | FlatModel,
    tokens: Int[Array, "b t"],
    following: Int[Array, "b t"],
    cache: KVCache,
    count: int,
) -> tuple[TokenLogprobs, KVCache]:
    """Returns the log-probabilities that the model gives to the tokens of a prompt, at full precision.

    Args:
      model: Dense or graded model.
      tokens: New tokens, as for ``prefill``; t is a multiple of ``LOGPROB_ROWS``.
      following: Token after each of them.
      cache: Keys and values of the earlier tokens. Donated.
      count: Number of most likely tokens whose log-probabilities are returned beside those of ``following``.

    Returns:
      Log-probabilities ``[b, t]``; those of padding are undefined. And the cache, with the same lengths.
    """
    model = decoder_of(model)
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, layers = model.hidden(tokens, positions, apply.Dense(), cache.layers)

    def some_rows(rows):
        x, following = rows
        return token_logprobs(full_logits(model, x), following, count)

    # Rows are processed a few at once, because the logits of a whole chunk would take gigabytes.
    rows = hidden.array.reshape(-1, LOGPROB_ROWS, hidden.array.shape[-1]), following.reshape(-1, LOGPROB_ROWS)
    logprobs = jax.tree.map(
        lambda values: values.reshape(*tokens.shape, *values.shape[2:]), jax.lax.map(some_rows, rows)
    )
    # ``prefill`` reads the same tokens again, from the same recurrent states.
    updated = cache.updated(layers, cache.lengths)
    return logprobs, dataclasses.replace(updated, fixed=cache.fixed)
