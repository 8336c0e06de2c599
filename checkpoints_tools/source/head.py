"""Reads a source checkpoint's output projection in ranges of the vocabulary."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_tools.source.layer import VALUES_IN_MEMORY
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.decoder_layer import RMSNorm
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.logit_transform import IDENTITY, LogitTransform


def vocabulary(source: HFCheckpoint, rows: int) -> Iterator[tuple[int, Float[Array, "d n"]]]:
    """Yields the output projection in ranges: the first token of each, and its kernel.

    Neither the kernel of a range nor the logits of ``rows`` tokens have more than ``VALUES_IN_MEMORY``
    values. The caller must wait for the results of one range before it asks for the next; otherwise many
    ranges are in memory at once.

    Args:
      source: Checkpoint.
      rows: Number of tokens whose logits the caller computes together.
    """
    width, tokens = source.config.hidden_size, source.config.vocab_size
    most = max(VALUES_IN_MEMORY // max(width, rows), 1)
    size = -(-tokens // -(-tokens // most))  # Ranges of equal length share compiled programs.
    for start in range(0, tokens, size):
        yield start, jnp.asarray(source.read(f"{HEAD}.kernel", slice(start, min(start + size, tokens))))


@jax.jit
def normed(norm: RMSNorm, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """Returns hidden states behind a norm."""
    return norm(x)


@jax.jit
def back_through_norm(
    norm: RMSNorm, x: Float[Array, "*rows d"], gradient: Float[Array, "*rows d"]
) -> Float[Array, "*rows d"]:
    """Returns the gradient before a norm, given the hidden states before and the gradient behind it."""
    return jax.vjp(norm, x)[1](gradient.astype(x.dtype))[0]


@jax.jit
def outputs(normed: Float[Array, "*rows d"], w: Float[Array, "d n"]) -> Float[Array, "*rows n"]:
    """Returns the float32 outputs of the output projection for hidden states after the final norm."""
    return jnp.matmul(normed, w.astype(normed.dtype), preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnames="transform")
def logits(
    normed: Float[Array, "*rows d"], w: Float[Array, "d n"], transform: LogitTransform = IDENTITY
) -> Float[Array, "*rows n"]:
    """Returns the float32 logits of hidden states after the final norm."""
    return transform(outputs(normed, w))


@jax.jit
def with_logits(normaliser: Float[Array, "*rows"], more: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """Updates a softmax's log-normaliser, ``log(sum(exp(logits)))``, with more logits. It starts at -inf."""
    return jnp.logaddexp(normaliser, jax.nn.logsumexp(more, axis=-1))
