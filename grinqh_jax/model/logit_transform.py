"""The function from outputs of the output projection to logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class LogitTransform:
    """The function from outputs y of the output projection to logits: ``cap * tanh(multiplier * y / cap)``.

    Attributes:
      multiplier: Factor of the outputs.
      soft_cap: Limit of the logits; None for no limit: ``multiplier * y``.
    """

    multiplier: float = 1.0
    soft_cap: float | None = None

    def __call__(self, outputs: Float[Array, "*rows v"]) -> Float[Array, "*rows v"]:
        """Returns the logits of float32 outputs."""
        logits = outputs if self.multiplier == 1 else outputs * self.multiplier
        return logits if self.soft_cap is None else jnp.tanh(logits / self.soft_cap) * self.soft_cap

    def derivative(self, outputs: Float[Array, "*rows v"]) -> Float[Array, "*rows v"] | float:
        """Returns the derivative of each logit with respect to its output."""
        if self.soft_cap is None:
            return self.multiplier
        return jax.jvp(self, (outputs,), (jnp.ones_like(outputs),))[1]


IDENTITY = LogitTransform()
"""The outputs are the logits."""
