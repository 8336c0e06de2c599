"""What goes in and out of a graded product where the sums around it are left to its neighbours.

Between two products of a decode step lie a few sums over a row of activations: the partial results of the
product before, the mean square of a norm. Each as a kernel of its own would cost as much as reading a
megabyte of weights. So a product leaves its result in parts, whatever comes next adds them up on the way,
and leaves *its* sums in parts for the next product.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartialSums:
    """The result of a matrix product, not yet summed over the parts of the input channels.

    Attributes:
      parts: float32 ``[parts, rows, columns]``; columns from ``features`` on are padding.
      features: logical number of columns.
    """

    parts: Float[Array, "parts rows columns"]
    features: int = dataclasses.field(metadata={"static": True})

    def total(self) -> Float[Array, "rows n"]:
        """The sum, float32, first part to last whatever the compiler does with its neighbours.

        Written as single additions: they fuse into the operation that uses the sum, where a reduction would
        be a kernel of its own, and their order is fixed.
        """
        total = self.parts[0]
        for i in range(1, self.parts.shape[0]):
            total = total + self.parts[i]
        return total[:, : self.features]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """The input of a graded product: ``x = values * factor``, one factor a row.

    RMSNorm's factor ``1 / sqrt(mean(h**2) + eps)`` is known only after a sum over the whole row, but it
    can wait: the product is linear in it, and its inverse times the thresholds gives the same levels.

    Attributes:
      values: ``[rows, K]`` float32, bfloat16 or float16.
      squares: float32 ``[rows, S]``: parts of ``mean(h**2)``; None where the factor is 1.
      eps: of the norm.
    """

    values: Float[Array, "rows k"]
    squares: Float[Array, "rows s"] | None = None
    eps: float = dataclasses.field(default=0.0, metadata={"static": True})

    def factor(self) -> Float[Array, "*rows 1"] | float:
        """What the values are to be multiplied by."""
        if self.squares is None:
            return 1.0
        return jax.lax.rsqrt(jnp.sum(self.squares, axis=-1, keepdims=True) + self.eps)

    def scaled(self, thresholds: Float[Array, "rows p"]) -> Float[Array, "rows p"]:
        """The thresholds in the scale of the values."""
        return thresholds / self.factor()
