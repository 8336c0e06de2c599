"""Choosing the next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p.

Every parameter is an array with one entry for each row of the batch, so changing one compiles nothing. These
choices select another program: whether all rows are greedy, and whether there are biases, penalties, masks.
The filters and their order are those of Hugging Face transformers: temperature, top-k, top-p (over the tokens
that top-k kept), min-p.

``adjust``, ``filtered`` and ``probabilities`` give the distribution of the next token, and ``choose_tokens``
samples from it: on an NVIDIA GPU with the kernel of ``pallas_kernels.sampling``, elsewhere with XLA. Both add
the same noise to the same scaled logits. They choose the same token unless two scores, or a sum of
probabilities and ``top_p``, differ by about 1e-6 or less, relative to the larger one: then rounding decides.
A row's token depends on the row alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from grinqh_jax.decoding.penalties import NEUTRAL, Penalties, TokenHistory, penalize
from grinqh_jax.decoding.policy import DecodePolicy
from pallas_kernels import sampling as kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a batch.

    Attributes:
      temperature: float32 ``[B]``; 0 selects the token with the largest logit.
      top_k: int32 ``[B]``; keeps the k most likely tokens and ties with the last of them; 0 keeps all.
      top_p: float32 ``[B]`` in (0, 1]; keeps the fewest most likely tokens whose probabilities sum to at
        least ``top_p``, and ties with the last of them; 1 keeps all.
      min_p: float32 ``[B]`` in [0, 1]; keeps tokens at least this fraction as likely as the most likely one.
      seed: uint32 ``[B]``; determines the random numbers together with the token's position, independently
        of the batch and of the decode chunks.
      greedy: True if every temperature is 0, so nothing is sorted and no random number is generated. Static,
        because a branch on the device would force a host sync at every step.
      penalties: Penalties on repeated tokens; None for none, which selects a program without them.
      logit_bias: float32 ``[B, V]``, added to the logits of the tokens before the penalties; None for none,
        which selects a program without it.
      allowed: uint32 ``[B, ceil(V / 32)]``, the tokens that may be chosen: bit ``t % 32`` of word ``t // 32``
        is set if token t is allowed. Each row needs an allowed token. None allows all, in a program without
        masks.
    """

    temperature: Float[Array, "b"]
    top_k: Int[Array, "b"]
    top_p: Float[Array, "b"]
    min_p: Float[Array, "b"]
    seed: UInt32[Array, "b"]
    greedy: bool = dataclasses.field(default=False, metadata={"static": True})
    penalties: Penalties | None = None
    logit_bias: Float[Array, "b v"] | None = None
    allowed: UInt32[Array, "b words"] | None = None

    @property
    def inverse_temperature(self) -> Float[Array, "b"]:
        """float32 ``[B]``, the factor of the logits. A row of temperature 0 has 1."""
        return 1 / jnp.where(self.temperature > 0, self.temperature, 1)

    @property
    def adjusts(self) -> bool:
        """Whether biases, penalties or masks change the logits."""
        return not (self.logit_bias is None and self.penalties is None and self.allowed is None)

    @classmethod
    def create(cls, batch: int = 1, **parameters: Any) -> "Sampling":
        """Returns ``on_host(batch, **parameters)`` on the device."""
        return jax.tree.map(jnp.asarray, cls.on_host(batch, **parameters))

    @classmethod
    def on_host(
        cls,
        batch: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Float[np.ndarray, "v"] | None = None,
    ) -> "Sampling":
        """Returns the same parameters for every row, as numpy arrays; row ``b`` has seed ``seed + b``."""

        def rows(value, dtype) -> Any:
            return np.full(batch, value, dtype)

        penalties = (repetition_penalty, presence_penalty, frequency_penalty)
        bias: Any = None if logit_bias is None else np.tile(logit_bias, (batch, 1))
        return cls(
            temperature=rows(temperature, np.float32),
            top_k=rows(top_k, np.int32),
            top_p=rows(top_p, np.float32),
            min_p=rows(min_p, np.float32),
            seed=rows(seed % 2**32, np.uint32) + np.arange(batch, dtype=np.uint32),
            greedy=not temperature > 0,
            penalties=None if penalties == tuple(NEUTRAL.values()) else Penalties.on_host(batch, *penalties),
            logit_bias=bias,
        )


def choose_tokens(
    logits: Float[Array, "b v"],
    sampling: Sampling,
    positions: Int[Array, "b"],
    policy: DecodePolicy,
    history: TokenHistory | None = None,
    *,
    token_ids: Int[Array, "v"] | None = None,
    in_order: Callable[[Float[Array, "b v"]], Float[Array, "b v"]] | None = None,
) -> Int[Array, "b"]:
    """Chooses the next token of every row, greedily or by sampling.

    Args:
      logits: float32.
      sampling: Sampling parameters of each row.
      positions: int32, position of the chosen token in its sequence.
      policy: Policy of the device (see ``DecodePolicy.skip_unused_sort``).
      history: Tokens that each row has; required if there are penalties.
      token_ids: int32, the token of each logit; None if the logits are in the order of the tokens.
      in_order: Function that returns the logits in the order of the tokens; required with ``token_ids``. It
        is not called where the order does not matter, because reordering takes longer than choosing.

    Returns:
      int32 ``[B]``.
    """
    if sampling.greedy and not sampling.adjusts:
        return greedy(logits, token_ids)
    if kernel.supports(logits) is None:
        parameters = _kernel_parameters(sampling, positions, history)
        with jax.named_scope("sampling"):
            return kernel.sample_tokens(logits, parameters, token_ids)
    if token_ids is not None:
        assert in_order is not None, "logits in another order need a function that reorders them"
        logits = in_order(logits)
    logits = adjust(logits, sampling, history)
    return greedy(logits) if sampling.greedy else sample(logits, sampling, positions, policy)


def adjust(
    logits: Float[Array, "b v"], sampling: Sampling, history: TokenHistory | None = None
) -> Float[Array, "b v"]:
    """Returns logits, in the order of the tokens, after biases, penalties and masks.

    Args:
      logits: float32, in the order of the tokens.
      sampling: Sampling parameters of each row.
      history: Tokens that each row has; required if there are penalties.
    """
    if sampling.logit_bias is not None:
        logits = logits + sampling.logit_bias
    if sampling.penalties is not None:
        assert history is not None, "penalties need the tokens that the text has"
        logits = penalize(logits, sampling.penalties, history)
    if sampling.allowed is not None:
        tokens = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
        allowed = (sampling.allowed[:, tokens // 32] >> (tokens % 32)) & 1
        logits = jnp.where(allowed == 1, logits, -jnp.inf)
    return logits


@jax.named_scope("sampling")
def probabilities(
    logits: Float[Array, "b v"], sampling: Sampling, policy: DecodePolicy
) -> Float[Array, "b v"]:
    """Returns the distribution that ``choose_tokens`` samples from, float32; greedy rows have a single 1.

    Args:
      logits: float32, in the order of the tokens, after ``adjust``.
      sampling: Sampling parameters of each row.
      policy: Policy of the device.
    """
    certain = jax.nn.one_hot(greedy(logits), logits.shape[-1], dtype=jnp.float32)
    if sampling.greedy:
        return certain
    sampled = jax.nn.softmax(filtered(logits, sampling, policy), axis=-1)
    return jnp.where(sampling.temperature[:, None] > 0, sampled, certain)


@jax.named_scope("sampling")
def greedy(logits: Float[Array, "b v"], token_ids: Int[Array, "v"] | None = None) -> Int[Array, "b"]:
    """Returns the token with the largest logit, int32 ``[B]``; the lowest token among equal logits.

    A NaN counts as the largest logit, so that it shows in the text instead of going unnoticed.

    Args:
      logits: float32, in any order.
      token_ids: int32, the token of each logit; None if the logits are in the order of the tokens.
    """
    if token_ids is None:
        token_ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)

    def better(one, other):
        (logit, token), (rival, rival_token) = one, other
        wins = (logit > rival) | ((logit == rival) & (token < rival_token))
        return jnp.where(wins, logit, rival), jnp.where(wins, token, rival_token)

    least = jnp.float32(-jnp.inf), jnp.iinfo(jnp.int32).max
    pairs = logits, jnp.broadcast_to(token_ids, logits.shape)
    return jax.lax.reduce(pairs, least, better, dimensions=[1])[1]


@jax.named_scope("sampling")
def sample(
    logits: Float[Array, "b v"], sampling: Sampling, positions: Int[Array, "b"], policy: DecodePolicy
) -> Int[Array, "b"]:
    """Samples a token for every row, or chooses it greedily where the temperature is 0.

    Adds Gumbel noise to the filtered logits and takes the maximum, which samples from their softmax.
    """
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        sampling.seed, positions
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    tokens = jnp.argmax(filtered(logits, sampling, policy) + noise, axis=-1).astype(jnp.int32)
    return jnp.where(sampling.temperature > 0, tokens, greedy(logits))


def filtered(logits: Float[Array, "b v"], sampling: Sampling, policy: DecodePolicy) -> Float[Array, "b v"]:
    """Divides logits, after ``adjust``, by the temperature and sets those of filtered tokens to ``-inf``.

    A row of temperature 0 is filtered at temperature 1.
    """
    scaled = logits * sampling.inverse_temperature[:, None]
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
    """Returns the smallest logit of each row that top-k and top-p keep."""
    vocabulary = scaled.shape[-1]
    ranked = jnp.sort(scaled, axis=-1, descending=True)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary)
    kth = jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
    kept = ranked >= kth
    probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    preceding = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = sampling.top_p[:, None]
    kept &= (preceding < top_p) | (top_p >= 1)
    kept |= jnp.arange(vocabulary) == 0
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1)


def _kernel_parameters(
    sampling: Sampling, positions: Int[Array, "b"], history: TokenHistory | None
) -> kernel.SamplingParameters:
    """Returns the arguments of the kernel."""
    penalties: dict[str, Any] = {}
    if sampling.penalties is not None:
        assert history is not None, "penalties need the tokens that the text has"
        penalties = {**vars(sampling.penalties), "history": history.packed}
    return kernel.SamplingParameters(
        temperature=jnp.zeros_like(sampling.temperature) if sampling.greedy else sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        position=positions,
        bias=sampling.logit_bias,
        allowed=sampling.allowed,
        **penalties,
    )
