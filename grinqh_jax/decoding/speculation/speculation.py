"""The choice of a drafter and of the number of drafts."""

import dataclasses

from grinqh_jax.decoding.reading import MAX_GRADED_ROWS
from grinqh_jax.decoding.speculation.drafter import Drafter
from grinqh_jax.errors import UsageError
from grinqh_jax.model.cache import rollback_lacks
from grinqh_jax.model.config import ModelConfig

MOST_DRAFTS = 7
"""Default of the largest number of drafts of a text in a step."""

DECODED_DRAFTS = 3
"""The same for drafters that decode: each draft takes them a step. By an estimate, 7 drafts of ``self`` at 2
bits would be faster than 3 only if more than 95 % of them were accepted (``benchmarks/notes``, entry D25)."""


@dataclasses.dataclass(frozen=True)
class Speculation:
    """A drafter, and the limits of its drafts.

    Attributes:
      drafter: Proposes the tokens.
      most_drafts: Largest number of drafts of a text in a step, 1 to 15.
      always: Whether to draft also where it does not pay.
    """

    drafter: Drafter
    most_drafts: int = MOST_DRAFTS
    always: bool = False

    @property
    def reads_prompts(self) -> bool:
        """Whether the drafter has a cache, in which it reads the prompts."""
        return self.drafter.reads_prompts


def check_speculation(config: ModelConfig, slots: int, contiguous: bool) -> None:
    """Checks that texts can be decoded with speculation.

    Args:
      config: Configuration of the model.
      slots: Number of texts that are decoded at once.
      contiguous: Whether texts share nothing. Their number is then not limited.

    Raises:
      UsageError: There are too many slots, or the cache of the model cannot be rolled back.
    """
    if slots > MAX_GRADED_ROWS and not contiguous:
        raise UsageError(
            f"speculation reads at most {MAX_GRADED_ROWS} rows together, and there are {slots} slots; use at "
            f"most {MAX_GRADED_ROWS}, or decode without speculation"
        )
    if (lacking := rollback_lacks(config)) is not None:
        raise UsageError(
            f"speculation needs a cache that can be rolled back, and this model has {lacking}; "
            "decode without speculation"
        )
