"""What the steps of a decode chunk with drafts did, counted on the device."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Counts(NamedTuple):
    """Counts of steps for each text, arrays ``[B]``.

    Attributes:
      steps: Number of steps.
      drafting_steps: Number of steps in which the text had drafts.
      drafted: Number of drafts that were verified.
      accepted: Number of drafts that were accepted.
      rejected_bits: Mean bits per weight read at each rejected position, summed.
      steps_with_any: Number of steps in which some text had drafts, the same for all texts.
    """

    steps: Any
    drafting_steps: Any
    drafted: Any
    accepted: Any
    rejected_bits: Any
    steps_with_any: Any

    @classmethod
    def of_step(
        cls,
        active: Bool[Array, "b"],
        drafted: Int[Array, "b"],
        produced: Int[Array, "b"],
        rejected_bits: Float[Array, "b"],
    ) -> "Counts":
        """Returns the counts of one step.

        Args:
          active: Texts that go on.
          drafted: Number of drafts of each text that the step verified.
          produced: Number of new tokens.
          rejected_bits: Mean bits per weight read at each rejected position, summed.
        """
        return cls(
            steps=active,
            drafting_steps=drafted > 0,
            drafted=drafted,
            accepted=jnp.maximum(produced - 1, 0),
            rejected_bits=rejected_bits,
            steps_with_any=jnp.broadcast_to(jnp.any(drafted > 0), drafted.shape),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedCounts:
    """Counts of a chunk.

    Attributes:
      packed: float32 ``[B, 6]``: the columns are the fields of ``Counts``. They are one array so that XLA
        updates them in one kernel. Counts are exact up to 2^24.
    """

    packed: Float[Array, "b 6"]

    @classmethod
    def zeros(cls, texts: int) -> "PackedCounts":
        """Returns the counts of no step."""
        return cls(jnp.zeros((texts, len(Counts._fields)), jnp.float32))

    def plus(self, step: Counts) -> "PackedCounts":
        """Returns the counts with those of one more step."""
        return PackedCounts(self.packed + jnp.stack([each.astype(jnp.float32) for each in step], axis=1))

    @property
    def unpacked(self) -> Counts:
        """The counts, float32."""
        return Counts(*(self.packed[:, column] for column in range(len(Counts._fields))))
