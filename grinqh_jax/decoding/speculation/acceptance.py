"""Which drafts are accepted, and which token follows them.

*By match*: the target chooses a token at every position, greedily or with the random numbers of this
position. Drafts are accepted up to the first that differs from the choice, and the choice follows them. So
the text is that of decoding without drafts, token for token, also if it is sampled. For a draft that is not
sampled this is the rejection rule, too: the target samples the draft with its probability, and otherwise
another token with the probabilities of the others.

*By rejection* (Leviathan et al., arXiv 2211.17192): a draft that was sampled from ``q`` is accepted with
probability ``min(1, p / q)``, where ``p`` is the distribution of the target. A token sampled from the
positive part of ``p - q`` takes the place of the first draft that is not accepted. The text has the
distribution of the target, but it depends on the drafts. Among all rules this one accepts the most drafts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.speculation.drafter import Draft

ACCEPTING, REPLACING, DRAFTING = 1, 2, 3
"""Streams of random numbers beside that of the sampler, which all positions have."""


def by_match(chosen: Int[Array, "b t"], draft: Draft) -> tuple[Int[Array, "b t"], Int[Array, "b"]]:
    """Returns the new tokens of each text and the number of accepted drafts.

    Args:
      chosen: Choice of the target after the last token and after each draft, ``t = k + 1``.
      draft: The drafts that were verified.

    Returns:
      ``(tokens, accepted)``: row b has ``accepted[b] + 1`` new tokens.
    """
    return chosen, _leading(draft.tokens == chosen[:, :-1], draft.counts)


def by_rejection(
    chosen: Int[Array, "b t"],
    draft: Draft,
    probabilities: Float[Array, "b t v"],
    sampling: Sampling,
    positions: Int[Array, "b t"],
) -> tuple[Int[Array, "b t"], Int[Array, "b"]]:
    """Returns the new tokens of each text and the number of accepted drafts, as ``by_match`` does.

    A text of temperature 0 accepts by match.

    Args:
      chosen: See ``by_match``.
      draft: Drafts that were verified, and sampled from ``draft.probabilities``.
      probabilities: Distribution of the target at each position, after all filters.
      sampling: Sampling parameters of each text.
      positions: Position of each chosen token in its text.
    """
    assert draft.probabilities is not None, "the rejection rule needs the distributions of the drafts"
    matched, accepted = by_match(chosen, draft)
    target, k = probabilities[:, :-1], draft.tokens.shape[1]
    p, q = (
        jnp.take_along_axis(values, draft.tokens[..., None], axis=-1)[..., 0]
        for values in (target, draft.probabilities)
    )
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(random_keys(sampling, positions[:, :-1], ACCEPTING))
    by_chance = _leading(uniform * q < p, draft.counts)
    residual = jnp.log(jnp.maximum(target - draft.probabilities, 0))
    keys = random_keys(sampling, positions[:, :-1], REPLACING)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, residual.shape[2:])))(keys)
    replaced = jnp.argmax(residual + noise, axis=-1).astype(jnp.int32)
    offset = jnp.arange(k)
    rejected = (offset == by_chance[:, None]) & (offset < draft.counts[:, None])
    tokens = jnp.where(
        offset < by_chance[:, None], draft.tokens, jnp.where(rejected, replaced, chosen[:, :-1])
    )
    tokens = jnp.concatenate([tokens, chosen[:, -1:]], axis=1)
    sampled = sampling.temperature > 0
    return jnp.where(sampled[:, None], tokens, matched), jnp.where(sampled, by_chance, accepted)


def random_keys(sampling: Sampling, positions: Int[Array, "b t"], stream: int) -> jax.Array:
    """Returns a key ``[B, t]`` for each position, of a stream that the sampler does not use."""

    def key(seed, position):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), stream)

    return jax.vmap(jax.vmap(key, (None, 0)))(sampling.seed, positions)


def _leading(accepts: Bool[Array, "b k"], counts: Int[Array, "b"]) -> Int[Array, "b"]:
    """Returns the number of leading drafts that are accepted, at most ``counts``."""
    accepts &= jnp.arange(accepts.shape[1]) < counts[:, None]
    return jnp.sum(jnp.cumprod(accepts, axis=1, dtype=jnp.int32), axis=1)
