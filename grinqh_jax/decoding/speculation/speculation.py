"""How an engine speculates."""

import dataclasses

from grinqh_jax.decoding.speculation.drafter import Drafter

MOST_DRAFTS = 7
"""Default of the largest number of drafts of a text in a step."""


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How an engine speculates.

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
