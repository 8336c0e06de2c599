"""The figures of speculation for one text. This module does not import JAX."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class SpeculationFigures:
    """Counts and times of speculation for one text.

    Attributes:
      steps: Number of decode steps.
      drafting_steps: Number of these that verified drafts.
      drafted, accepted: Number of drafts that were verified, and of these that were accepted.
      seconds: Time of decode chunks with drafts, drafting and verification together.
      rejected_bits: Mean bits per weight read at each rejected position, summed.
    """

    steps: int = 0
    drafting_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    rejected_bits: float = 0.0

    def add(
        self,
        steps: int,
        drafting_steps: int,
        drafted: int,
        accepted: int,
        rejected_bits: float,
        seconds: float,
    ) -> None:
        """Adds the figures of a decode chunk."""
        self.steps += steps
        self.drafting_steps += drafting_steps
        self.drafted += drafted
        self.accepted += accepted
        self.rejected_bits += rejected_bits
        self.seconds += seconds

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of a decode step, the accepted drafts included."""
        return (self.steps + self.accepted) / self.steps if self.steps else None

    @property
    def acceptance(self) -> float | None:
        """Share of the verified drafts that were accepted."""
        return self.accepted / self.drafted if self.drafted else None

    def bits_per_token(self, realised_bits: float | None) -> float | None:
        """Returns the mean bits per weight read for a token of the text, rejected drafts included.

        Every position counts as if it were read alone.

        Args:
          realised_bits: Mean bits per weight of the tokens of the text.
        """
        if realised_bits is None or not self.steps:
            return None
        return realised_bits + self.rejected_bits / (self.steps + self.accepted)

    def line(self, realised_bits: float | None) -> str:
        """Returns the figures for people."""
        if not self.drafted or self.tokens_per_step is None:
            return f"speculation: no drafts in {self.steps} steps"
        text = (
            f"speculation: {self.tokens_per_step:.2f} tokens a step, {self.accepted} of {self.drafted} "
            "drafts accepted"
        )
        bits = self.bits_per_token(realised_bits)
        return text if bits is None else f"{text}, {bits:.3f} bits per weight and token with rejected drafts"

    def to_json(self, realised_bits: float | None) -> dict[str, Any]:
        """Returns all figures for programs."""
        return dataclasses.asdict(self) | {
            "tokens_per_step": self.tokens_per_step,
            "acceptance": self.acceptance,
            "bits_per_token": self.bits_per_token(realised_bits),
        }
