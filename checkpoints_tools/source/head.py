"""A source checkpoint's output projection, a block of the vocabulary at a time."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_tools.source.layer import BLOCK_VALUES
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.apply import HEAD


def vocabulary(source: HFCheckpoint, rows: int) -> Iterator[tuple[int, Float[Array, "d n"]]]:
    """The output projection in blocks: the first token of each, and its kernel.

    Neither a block nor the logits of ``rows`` tokens in it are more than ``BLOCK_VALUES``. What is
    computed from one is to be waited for before the next, or many would be in memory at once.
    """
    width, tokens = source.config.hidden_size, source.config.vocab_size
    block = max(BLOCK_VALUES // max(width, rows), 1)
    for start in range(0, tokens, block):
        yield start, jnp.asarray(source.read(f"{HEAD}.kernel", slice(start, min(start + block, tokens))))


@jax.jit
def logits(normed: Float[Array, "t d"], w: Float[Array, "d n"]) -> Float[Array, "t n"]:
    """float32, of states behind the last norm."""
    return jnp.matmul(normed, w.astype(normed.dtype), preferred_element_type=jnp.float32)


@jax.jit
def with_logits(normaliser: Float[Array, "t"], more: Float[Array, "t n"]) -> Float[Array, "t"]:
    """The logarithm of the sum that a softmax divides by, with more logits in it; of none it is -inf."""
    return jnp.logaddexp(normaliser, jax.nn.logsumexp(more, axis=-1))
