"""What the steps of a decode chunk with drafts did, counted on the device."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of a chunk for each text.

    Attributes:
      packed: float32 ``[B, 6]``: the columns are the properties in their order. They are one array so that
        XLA updates them in one kernel. Counts are exact up to 2^24.
    """

    packed: Float[Array, "b 6"]

    @classmethod
    def zeros(cls, texts: int) -> "Counts":
        """Returns the counts of no step."""
        return cls(jnp.zeros((texts, 6), jnp.float32))

    def plus_step(
        self,
        active: Bool[Array, "b"],
        drafted: Int[Array, "b"],
        produced: Int[Array, "b"],
        rejected_bits: Float[Array, "b"],
    ) -> "Counts":
        """Returns the counts after a step.

        Args:
          active: Texts that go on.
          drafted: Number of drafts of each text that the step verified.
          produced: Number of new tokens.
          rejected_bits: Mean bits per weight read at each rejected position, summed.
        """
        any_drafts = jnp.broadcast_to(jnp.any(drafted > 0), drafted.shape)
        accepted = jnp.maximum(produced - 1, 0)
        columns = active, drafted > 0, drafted, accepted, rejected_bits, any_drafts
        return Counts(self.packed + jnp.stack([column.astype(jnp.float32) for column in columns], axis=1))

    @property
    def steps(self) -> Float[Array, "b"]:
        """Number of steps."""
        return self.packed[:, 0]

    @property
    def drafting_steps(self) -> Float[Array, "b"]:
        """Number of steps in which the text had drafts."""
        return self.packed[:, 1]

    @property
    def drafted(self) -> Float[Array, "b"]:
        """Number of drafts that were verified."""
        return self.packed[:, 2]

    @property
    def accepted(self) -> Float[Array, "b"]:
        """Number of drafts that were accepted."""
        return self.packed[:, 3]

    @property
    def rejected_bits(self) -> Float[Array, "b"]:
        """Mean bits per weight read at each rejected position, summed."""
        return self.packed[:, 4]

    @property
    def steps_with_any(self) -> Float[Array, "b"]:
        """Number of steps in which some text had drafts, the same for all texts."""
        return self.packed[:, 5]
