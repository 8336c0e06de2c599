"""The activations that travel between the kernels of a decode step, with some sums left to the next kernel.

Between two products of a decode step, every row of activations needs a few sums: over the partial sums of the
product, and over the squares that a norm averages. A separate kernel for each sum would take as long as
reading a megabyte of weights. Each kernel therefore writes partial sums, and the next kernel adds them up.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """Rows of activations, as partial sums and a factor that the kernel that reads them applies.

    ``value = (sum(partials, axis=0)[..., :features]).astype(dtype) * factor``, where ``factor`` is 1, or, if
    there are ``square_partials``, RMSNorm's ``rsqrt(sum(square_partials, axis=-1) + eps)`` for each row. The
    factor can be applied after a product, because the product is linear in it, and because thresholds divided
    by it give the same levels. A plain array is one partial sum without a factor.

    Attributes:
      partials: ``[partials, *leading, stored_features]``, float32 if there are several, else float32,
        bfloat16 or float16. Features after the first ``features`` are padding.
      square_partials: float32 ``[*leading, sums]``; their sum is the mean square that the norm divides by.
        None if the factor is 1.
      features: Logical number of features.
      dtype: Dtype of the value.
      eps: Epsilon of the norm.
    """

    partials: Float[Array, "partials *leading stored_features"]
    square_partials: Float[Array, "*leading sums"] | None
    features: int = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(default=0.0, metadata={"static": True})

    @classmethod
    def of(
        cls,
        array: Float[Array, "*leading features"],
        square_partials: Float[Array, "*leading sums"] | None = None,
        eps: float = 0.0,
    ) -> "Activations":
        """Wraps an array, to which the factor of a norm may still have to be applied.

        Args:
          array: Activations before the factor, of any float dtype.
          square_partials, eps: See ``Activations``.
        """
        return cls(
            array.reshape(1, *array.shape), square_partials, array.shape[-1], jnp.dtype(array.dtype), eps
        )

    @classmethod
    def sums(
        cls, partials: Float[Array, "partials *leading stored_features"], features: int
    ) -> "Activations":
        """Wraps the float32 partial sums of a product."""
        return cls(partials, None, features, jnp.dtype(jnp.float32))

    @property
    def leading(self) -> tuple[int, ...]:
        """Shape of the value without its last axis."""
        return self.partials.shape[1:-1]

    @property
    def values(self) -> Float[Array, "*leading features"]:
        """The sums in ``dtype``, without the factor.

        The partials are added one by one in a fixed order. XLA fuses single additions into the operation that
        uses the sum, but would compile a reduction to a separate kernel.
        """
        if len(self.partials) == 1:
            total = self.partials.reshape(self.partials.shape[1:])
        else:
            total = self.partials[0]
            for i in range(1, len(self.partials)):
                total = total + self.partials[i]
        return total[..., : self.features].astype(self.dtype)

    @property
    def array(self) -> Float[Array, "*leading features"]:
        """The value, in ``dtype``."""
        if self.square_partials is None:
            return self.values
        return (self.values.astype(jnp.float32) * self.factor()).astype(self.dtype)

    def factor(self) -> Float[Array, "*leading 1"] | float:
        """Returns the float32 factor of each row, or 1.0 without ``square_partials``."""
        if self.square_partials is None:
            return 1.0
        return jax.lax.rsqrt(jnp.sum(self.square_partials, axis=-1, keepdims=True) + self.eps)

    def scale_thresholds(self, thresholds: Float[Array, "*leading p"]) -> Float[Array, "*leading p"]:
        """Returns thresholds that give ``values`` the levels that ``thresholds`` give the value."""
        return thresholds / self.factor()

    def astype(self, dtype) -> "Activations":
        """Returns the same partial sums with another ``dtype`` of the value."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def plus(self, vector: Float[Array, "features"]) -> "Activations":
        """Returns the activations plus a vector that all rows share; they must not lack a factor."""
        assert self.square_partials is None, "the factor of a norm would multiply the vector"
        padding = self.partials.shape[-1] - self.features
        first = self.partials[0] + jnp.pad(vector, (0, padding)).astype(self.partials.dtype)
        return dataclasses.replace(self, partials=self.partials.at[0].set(first))

    def scaled(self, factor: float) -> "Activations":
        """Returns the activations times a number."""
        return dataclasses.replace(self, partials=self.partials * factor)

    def summed(self) -> "Activations":
        """Returns the sum over the last leading axis; the activations must not lack a factor.

        float32 partial sums become partial sums of the total, which the next kernel adds up.
        """
        assert self.square_partials is None, "the rows have different factors"
        if self.partials.dtype != jnp.float32:
            return Activations.of(jnp.sum(self.array, axis=-2, dtype=jnp.float32).astype(self.dtype))
        partials = jnp.moveaxis(self.partials, -2, 1)
        return dataclasses.replace(self, partials=partials.reshape(-1, *partials.shape[2:]))

    def summed_across(self, axis: str) -> "Activations":
        """Returns the sum over the devices of a mesh axis, as one float32 partial sum, inside ``shard_map``.

        Each device adds up its partial sums, and one exchange adds up those of all devices.
        """
        assert self.square_partials is None, "the factor of a norm belongs to the whole sum"
        total = jnp.sum(self.partials, axis=0, dtype=jnp.float32)
        return dataclasses.replace(self, partials=jax.lax.psum(total, axis)[None])

    def reshape(self, leading: Sequence[int]) -> "Activations":
        """Returns the same rows with another leading shape."""
        partials, squares = self.partials, self.square_partials
        partials = partials.reshape(len(partials), *leading, partials.shape[-1])
        squares = None if squares is None else squares.reshape(*leading, squares.shape[-1])
        return dataclasses.replace(self, partials=partials, square_partials=squares)
