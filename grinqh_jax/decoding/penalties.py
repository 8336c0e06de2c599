"""Penalties on tokens that a text already has, against repetition.

All parameters are arrays with one entry for each row. A batch without penalties runs another program, which
does not compute them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Values that change nothing, by name of the parameter."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """Penalties of a batch.

    Attributes:
      repetition: float32 ``[B]``. Divides positive logits of all tokens in prompt and text, and multiplies
        negative ones (CTRL, arXiv 1909.05858, as Hugging Face transformers applies it); 1 changes nothing.
      presence: float32 ``[B]``, subtracted from the logits of generated tokens.
      frequency: float32 ``[B]``, subtracted from the logit of a generated token once for each occurrence.
        Presence and frequency have the meaning of OpenAI's API, which does not count the prompt.
    """

    repetition: Float[Array, "b"]
    presence: Float[Array, "b"]
    frequency: Float[Array, "b"]

    @classmethod
    def on_host(cls, batch: int, repetition: float, presence: float, frequency: float) -> "Penalties":
        """Returns the same penalties for every row, as numpy arrays."""
        values: Any = [np.full(batch, value, np.float32) for value in (repetition, presence, frequency)]
        return cls(*values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenHistory:
    """The tokens in each row's prompt and generated text.

    Attributes:
      packed: int32 ``[B, V]``: twice the number of occurrences of the token in the generated text, plus 1 if
        the prompt has the token. One array, because the kernel that samples gathers it by token.
    """

    packed: Int[Array, "b v"]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], vocabulary: int) -> "TokenHistory":
        """Returns the history before the first generated token."""
        in_prompt = np.zeros((len(prompts), vocabulary), bool)
        for row, prompt in zip(in_prompt, prompts, strict=True):
            row[np.asarray(prompt)] = True
        return cls.before_text(jnp.asarray(in_prompt))

    @classmethod
    def before_text(cls, in_prompt: Bool[Array, "b v"]) -> "TokenHistory":
        """Returns the history before the first generated token, from whether the prompt has each token."""
        return cls(in_prompt.astype(jnp.int32))

    @property
    def in_prompt(self) -> Bool[Array, "b v"]:
        """bool ``[B, V]``, whether the prompt has the token."""
        return (self.packed & 1) == 1

    @property
    def generated(self) -> Int[Array, "b v"]:
        """int32 ``[B, V]``, number of occurrences of the token in the generated text."""
        return self.packed >> 1

    def with_tokens(self, tokens: Int[Array, "b"], active: Bool[Array, "b"]) -> "TokenHistory":
        """Returns the history after one more token in each active row."""
        rows = jnp.arange(len(tokens))
        return TokenHistory(self.packed.at[rows, tokens].add(2 * active.astype(jnp.int32)))


@jax.named_scope("penalties")
def penalize(logits: Float[Array, "b v"], penalties: Penalties, history: TokenHistory) -> Float[Array, "b v"]:
    """Returns float32 logits, in the order of the tokens, after the penalties."""
    repetition, presence, frequency = (
        values[:, None] for values in (penalties.repetition, penalties.presence, penalties.frequency)
    )
    generated = history.generated
    occurs = generated > 0
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(occurs | history.in_prompt, repeated, logits)
    return logits - jnp.where(occurs, presence, 0) - frequency * generated
