"""Prompt lookup: drafts what followed the last tokens of a text where they occur earlier in the text.

Answers that quote or edit a text repeat long parts of it. Lookup needs no model, and takes one pass over the
tokens of the text. Source of the idea: Saxena, Prompt Lookup Decoding, 2023.

If different tokens followed the same last tokens earlier, there is no draft: fewer drafts would be accepted
than a step with drafts costs (``benchmarks/notes``, entry D27).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from grinqh_jax.decoding.speculation.drafter import Draft, DrafterState, Stateless, Target, Texts
from grinqh_jax.model.cache import KVCache

MOST_MATCHED = 8
"""Number of last tokens that are compared. Among the occurrences with the most equal tokens, the last
counts."""

LEAST_MATCHED = 2
"""Least number of equal tokens of an occurrence that is used."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLookup(Stateless):
    """The drafter (see ``drafter.Drafter``).

    Attributes:
      least: Least number of last tokens that must occur earlier.
      most: Number of last tokens that are compared.
    """

    least: int = dataclasses.field(default=LEAST_MATCHED, metadata={"static": True})
    most: int = dataclasses.field(default=MOST_MATCHED, metadata={"static": True})

    def propose(
        self, state: DrafterState, target: Target, texts: Texts, count: int
    ) -> tuple[Draft, DrafterState, KVCache]:
        """Drafts up to ``count`` tokens for each text."""
        draft = look_up(texts.tokens, texts.lengths, count, self.least, self.most)
        return draft, state, target.cache


@jax.named_scope("lookup")
def look_up(tokens: Int[Array, "b s"], lengths: Int[Array, "b"], count: int, least: int, most: int) -> Draft:
    """Returns the tokens after the longest and last earlier occurrence of the last tokens of each text.

    If the occurrence is closer to the end than ``count`` tokens, the tokens after it are repeated, as in a
    text that repeats itself. There is no draft if another occurrence of the same length has another next
    token.

    Args:
      tokens: Tokens of each text.
      lengths: Number of tokens of each text.
      count: Number of tokens to draft.
      least, most: See ``PromptLookup``.
    """
    slots = tokens.shape[1]
    positions = jnp.arange(slots)
    # matched[b, j] is the number of tokens up to position j that equal the last tokens of the text.
    matched = jnp.zeros(tokens.shape, jnp.int32)
    equal = positions < lengths[:, None] - 1
    for i in range(most):
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1 - i, 0)[:, None], axis=1)
        earlier = jnp.pad(tokens, ((0, 0), (i, 0)), constant_values=-1)[:, :slots]
        equal &= (earlier == last) & (lengths > i)[:, None]
        matched += equal
    # One maximum finds the longest match, and among these the last.
    best = jnp.max(jnp.where(matched >= least, matched * slots + positions, -1), axis=1)
    start = best % slots + 1
    period = jnp.maximum(lengths - start, 1)
    offsets = start[:, None] + jnp.arange(count) % period[:, None]
    drafts = jnp.take_along_axis(tokens, jnp.minimum(offsets, slots - 1), axis=1)
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    longest = matched == (best // slots)[:, None]
    differs = jnp.any(longest & (following != drafts[:, :1]), axis=1)
    return Draft(drafts, jnp.where((best >= 0) & ~differs, count, 0))
