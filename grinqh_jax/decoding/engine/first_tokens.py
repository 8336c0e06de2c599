"""The step from prompts to answers: the first token of each, and the dial after the previews."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.engine.prompt import Preview
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling, choose_tokens


@jax.jit(static_argnames="policy")
def first_tokens(
    logits: Float[Array, "b v"],
    preview: Preview | None,
    positions: Int[Array, "b"],
    sampling: Sampling,
    history: TokenHistory | None,
    dial: Dial | None,
    *,
    policy: DecodePolicy,
) -> tuple[Int[Array, "b"], TokenHistory | None, Dial | None]:
    """Chooses the first token of each answer, after a prefill, and prepares the decoding of the others.

    Args:
      logits: float32, after each prompt.
      preview: Preview of the end of each prompt, if there is a dial.
      positions: Position of the first token of each answer.
      sampling: Sampling parameters of each row.
      history: Tokens of each prompt, if ``sampling`` has penalties.
      dial: Dial before the preview; None for a dense model.
      policy: Policy of the device.

    Returns:
      The tokens, the history with them, and the dial after it has observed the preview.
    """
    tokens = choose_tokens(logits, sampling, positions, policy, history)
    if history is not None:
        history = history.with_tokens(tokens, jnp.ones(len(tokens), bool))
    if dial is not None:
        assert preview is not None, "a graded model has previews"
        dial = dial.observe(preview.bits, preview.counts)
    return tokens, history, dial
