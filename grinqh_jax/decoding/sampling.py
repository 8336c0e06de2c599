"""Choosing the next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p.

Every parameter is an array with one entry per row of the batch, so that changing one compiles nothing; only
batches in which nothing is drawn have a program of their own. The filters mean what they mean in Hugging
Face transformers, in its order: temperature, top-k, top-p (of what top-k left), min-p.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from grinqh_jax.decoding.policy import DecodePolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a batch.

    Attributes:
      temperature: float32 ``[B]``; 0 takes the most likely token.
      top_k: int32 ``[B]``; keep the k most likely tokens (and ties with the last of them); 0 keeps all.
      top_p: float32 ``[B]`` in (0, 1]; keep the fewest most likely tokens whose probabilities add up
        to it (and ties with the last of them); 1 keeps all.
      min_p: float32 ``[B]`` in [0, 1]; keep tokens at least this fraction as likely as the likeliest.
      seed: uint32 ``[B]``; with the token's position it determines the draw, whatever the batch or
        the division into chunks.
      draws: False where every temperature is 0, and nothing needs to be sorted or drawn. Static: to ask
        the device would make it wait for the host at every step.
    """

    temperature: Float[Array, "b"]
    top_k: Int[Array, "b"]
    top_p: Float[Array, "b"]
    min_p: Float[Array, "b"]
    seed: UInt32[Array, "b"]
    draws: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def create(
        cls,
        batch: int = 1,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> "Sampling":
        """The same parameters for every row; row ``b`` draws with ``seed + b``."""

        def rows(value, dtype):
            return jnp.full(batch, value, dtype)

        return cls(
            temperature=rows(temperature, jnp.float32),
            top_k=rows(top_k, jnp.int32),
            top_p=rows(top_p, jnp.float32),
            min_p=rows(min_p, jnp.float32),
            seed=rows(seed % 2**32, jnp.uint32) + jnp.arange(batch, dtype=jnp.uint32),
            draws=temperature > 0,
        )


@jax.named_scope("sampling")
def sample(
    logits: Float[Array, "b v"], sampling: Sampling, positions: Int[Array, "b"], policy: DecodePolicy
) -> Int[Array, "b"]:
    """The next token of every row, int32.

    Args:
      logits: float32.
      sampling: the parameters.
      positions: of the tokens to be chosen, in their sequences.
      policy: whether to skip a sort that no row needs.
    """
    return drawn(logits, sampling, positions, policy) if sampling.draws else likeliest(logits)


@jax.named_scope("sampling")
def likeliest(logits: Float[Array, "b v"], tokens: Int[Array, "v"] | None = None) -> Int[Array, "b"]:
    """``sample`` where every temperature is 0: the largest logit, of equal ones that of the lowest token.

    Args:
      logits: float32, in any order.
      tokens: int32, what each logit is of; None where they are in the order of the tokens.
    """
    if tokens is None:
        tokens = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)  # shown, not passed over

    def better(one, other):
        (logit, token), (rival, rival_token) = one, other
        wins = (logit > rival) | ((logit == rival) & (token < rival_token))
        return jnp.where(wins, logit, rival), jnp.where(wins, token, rival_token)

    least = jnp.float32(-jnp.inf), jnp.iinfo(jnp.int32).max
    pairs = logits, jnp.broadcast_to(tokens, logits.shape)
    return jax.lax.reduce(pairs, least, better, dimensions=[1])[1]


@jax.named_scope("sampling")
def drawn(
    logits: Float[Array, "b v"], sampling: Sampling, positions: Int[Array, "b"], policy: DecodePolicy
) -> Int[Array, "b"]:
    """``sample`` where some temperature is not 0."""
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        sampling.seed, positions
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    tokens = jnp.argmax(filtered(logits, sampling, policy) + noise, axis=-1).astype(jnp.int32)
    return jnp.where(sampling.temperature > 0, tokens, likeliest(logits))


def filtered(logits: Float[Array, "b v"], sampling: Sampling, policy: DecodePolicy) -> Float[Array, "b v"]:
    """Logits over the temperature, ``-inf`` for the tokens that the filters remove.

    A row of temperature 0 is left at temperature 1.
    """
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1)
    scaled = logits / temperature[:, None]
    if policy.skip_unused_sort:
        needed = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
        cutoff = jax.lax.cond(
            needed, lambda: _cutoff(scaled, sampling), lambda: jnp.full(len(scaled), -jnp.inf, scaled.dtype)
        )
    else:
        cutoff = _cutoff(scaled, sampling)
    cutoff = jnp.maximum(cutoff, jnp.max(scaled, axis=-1) + jnp.log(sampling.min_p))
    return jnp.where(scaled >= cutoff[:, None], scaled, -jnp.inf)


def _cutoff(scaled: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b"]:
    """The smallest logit of each row that top-k and top-p keep."""
    vocabulary = scaled.shape[-1]
    ranked = jnp.sort(scaled, axis=-1, descending=True)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary)
    kth = jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
    kept = ranked >= kth
    probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = sampling.top_p[:, None]
    kept &= (likelier < top_p) | (top_p >= 1)
    kept |= jnp.arange(vocabulary) == 0
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1)
