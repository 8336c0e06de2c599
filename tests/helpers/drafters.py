"""Drafters for tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grinqh_jax.decoding.speculation.drafter import Draft, Stateless


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KnownTexts(Stateless):
    """Drafts the tokens of known texts, but a wrong one at every position that is a multiple of ``wrong``.

    Row b of a contiguous cache has text b.

    Attributes:
      texts: int32 ``[B, S]``.
      wrong: int32 scalar, period of wrong drafts; 0 for none.
      most: Largest number of drafts of a step.
    """

    texts: Int[Array, "b s"]
    wrong: Int[Array, ""]
    most: int = dataclasses.field(default=16, metadata={"static": True})

    @classmethod
    def of(cls, texts, capacity: int, *, wrong: int = 3, **options) -> "KnownTexts":
        rows = np.zeros((len(texts), capacity), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text)] = text
        return cls(jnp.asarray(rows), jnp.int32(wrong), **options)

    def propose(self, state, target, texts, count):
        places = texts.lengths[:, None] + jnp.arange(count)
        tokens = jnp.take_along_axis(self.texts, jnp.minimum(places, self.texts.shape[1] - 1), axis=1)
        is_wrong = (self.wrong > 0) & (places % jnp.maximum(self.wrong, 1) == 0)
        tokens = jnp.where(is_wrong, (tokens + 1) % 7, tokens)
        counts = jnp.full(len(tokens), min(count, self.most))
        return Draft(tokens, counts), state, target.cache
