"""A prompt of which prefill has read the leading tokens."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding.engine.prompt import PREVIEW_TOKENS, Preview
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.model.fixed_states import FixedStates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """A prompt of which prefill has read the leading tokens.

    Attributes:
      pages: int32 ``[1, pages_per_slot]``, pages of the whole text, the answer included.
      length: int32 ``[1]``, number of tokens read.
      logits: float32 ``[1, V]`` after the last token read.
      preview: Preview of the end of what was read; None for a dense model.
      fixed: States of a fixed size after the last token read.
    """

    pages: Int[Array, "1 pages_per_slot"]
    length: Int[Array, "1"]
    logits: Float[Array, "1 v"]
    preview: Preview | None
    fixed: FixedStates

    @classmethod
    def create(
        cls, config: ModelConfig, pages: Any, length: int, graded: bool, fixed: FixedStates
    ) -> "Prefix":
        """Returns a prefix as numpy arrays.

        Args:
          config: Configuration of the model.
          pages: int32 ``[pages_per_slot]``, numpy.
          length: Number of tokens in shared pages.
          graded: Whether the model is graded.
          fixed: States of a fixed size after these tokens.
        """

        def zeros(*shape, dtype=np.float32):
            return np.zeros(shape, dtype)

        previewed = zeros(1, PREVIEW_TOKENS, len(linear_names(config)))
        preview = Preview(previewed, zeros(1, dtype=np.int32)) if graded else None
        read: Any = np.array([length], np.int32)
        return cls(pages[None], read, zeros(1, config.vocab_size), preview, fixed)
