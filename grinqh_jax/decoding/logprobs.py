"""Log-probabilities of chosen tokens and of the most likely ones, for callers that report them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MOST_LOGPROBS = 20
"""Largest number of most likely tokens that are reported for each token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities in nats, by the model's logits before penalties, biases, temperature and filters.

    Attributes:
      chosen: float32 ``[*B]``, log-probability of the chosen token.
      top: float32 ``[*B, K]``, log-probabilities of the most likely tokens, descending.
      top_tokens: int32 ``[*B, K]``, the most likely tokens.
    """

    chosen: Float[Array, "*b"]
    top: Float[Array, "*b k"]
    top_tokens: Int[Array, "*b k"]

    @classmethod
    def zeros(cls, *shape: int) -> "TokenLogprobs":
        """Returns zeros for arrays of shape ``[*B, K]``."""
        return cls(jnp.zeros(shape[:-1]), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))


@jax.named_scope("logprobs")
def token_logprobs(logits: Float[Array, "b v"], tokens: Int[Array, "b"], count: int) -> TokenLogprobs:
    """Returns the log-probabilities of the tokens and of the ``count`` most likely ones.

    Args:
      logits: float32, in the order of the tokens.
      tokens: Chosen token of each row.
      count: Number of most likely tokens, at most V.
    """
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return TokenLogprobs(chosen, *jax.lax.top_k(logprobs, count))
