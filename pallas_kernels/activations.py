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

    A token of a mixture of experts is several rows. ``repeats`` lets them share one row of values, and
    ``terms`` leaves the sum over them to the next kernel.

    Attributes:
      partials: ``[partials, *leading, terms stored_features]``, float32 if there are several numbers to add,
        else float32, bfloat16 or float16. Features after the first ``features`` are padding.
      square_partials: float32 ``[*leading, sums]``; their sum is the mean square that the norm divides by.
        None if the factor is 1.
      features: Logical number of features.
      dtype: Dtype of the value.
      eps: Epsilon of the norm.
      repeats: Number of consecutive rows of the last leading axis that share values. They are stored once, so
        this axis of ``partials`` is shorter by this factor. Rows may differ in their factor.
      terms: Number of rows of features that each row of a partial sum consists of, and that are added, too.
    """

    partials: Float[Array, "partials *stored_leading stored_features"]
    square_partials: Float[Array, "*leading sums"] | None
    features: int = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(default=0.0, metadata={"static": True})
    repeats: int = dataclasses.field(default=1, metadata={"static": True})
    terms: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def of(
        cls,
        array: Float[Array, "*stored_leading features"],
        square_partials: Float[Array, "*leading sums"] | None = None,
        eps: float = 0.0,
        repeats: int = 1,
    ) -> "Activations":
        """Wraps an array, to which the factor of a norm may still have to be applied.

        Args:
          array: Activations before the factor, of any float dtype.
          square_partials, eps, repeats: See ``Activations``.
        """
        dtype = jnp.dtype(array.dtype)
        return cls(array.reshape(1, *array.shape), square_partials, array.shape[-1], dtype, eps, repeats)

    @classmethod
    def sums(
        cls, partials: Float[Array, "partials *leading stored_features"], features: int
    ) -> "Activations":
        """Wraps the float32 partial sums of a product."""
        return cls(partials, None, features, jnp.dtype(jnp.float32))

    @property
    def leading(self) -> tuple[int, ...]:
        """Shape of the value without its last axis."""
        stored = self.partials.shape[1:-1]
        return stored if self.repeats == 1 else (*stored[:-1], stored[-1] * self.repeats)

    @property
    def values(self) -> Float[Array, "*leading features"]:
        """The sums in ``dtype``, without the factor."""
        values = self.stored_values
        return values if self.repeats == 1 else jnp.repeat(values, self.repeats, axis=-2)

    @property
    def stored_values(self) -> Float[Array, "*stored_leading features"]:
        """The values of rows that share them only once.

        The partials are added one by one in a fixed order. XLA fuses single additions into the operation that
        uses the sum, but would compile a reduction to a separate kernel.
        """
        stored = self.partials.shape[-1] // self.terms
        if len(self.partials) == 1:
            rows = [self.partials.reshape(self.partials.shape[1:])]
        else:
            rows = [self.partials[i] for i in range(len(self.partials))]
        parts = [row[..., j * stored : j * stored + self.features] for row in rows for j in range(self.terms)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.astype(self.dtype)

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

    def plus(self, vector: Float[Array, "*#leading features"]) -> "Activations":
        """Returns the activations plus a vector, shared or of each row; they must not lack a factor."""
        assert self.square_partials is None, "the factor of a norm would multiply the vector"
        assert self.repeats == 1, "rows that share values may have different vectors"
        assert self.terms == 1, "the vector would be added to the first term alone"
        padding = self.partials.shape[-1] - self.features
        widths = [(0, 0)] * (vector.ndim - 1) + [(0, padding)]
        first = self.partials[0] + jnp.pad(vector, widths).astype(self.partials.dtype)
        return dataclasses.replace(self, partials=self.partials.at[0].set(first))

    def scaled(self, factor: float) -> "Activations":
        """Returns the activations times a number."""
        return dataclasses.replace(self, partials=self.partials * factor)

    def summed(self) -> "Activations":
        """Returns the sum over the last leading axis; the activations must not lack a factor.

        float32 partial sums become partial sums of the total, which the next kernel adds up.
        """
        assert self.square_partials is None, "the rows have different factors"
        assert self.repeats == 1, "the rows are stored once"
        if self.partials.dtype != jnp.float32:
            return Activations.of(jnp.sum(self.array, axis=-2, dtype=jnp.float32).astype(self.dtype))
        *shape, terms, stored = self.partials.shape
        partials = self.partials.reshape(*shape, terms * stored)
        return dataclasses.replace(self, partials=partials, terms=terms * self.terms)

    def summed_across(self, axis: str) -> "Activations":
        """Returns the sum over the devices of a mesh axis, as one float32 partial sum, inside ``shard_map``.

        Each device adds up its partial sums, and one exchange adds up those of all devices.
        """
        assert self.square_partials is None, "the factor of a norm belongs to the whole sum"
        total = jnp.sum(self.partials, axis=0, dtype=jnp.float32)
        total = jnp.sum(total.reshape(*total.shape[:-1], self.terms, -1), axis=-2)
        return dataclasses.replace(self, partials=jax.lax.psum(total, axis)[None], terms=1)

    def reshape(self, leading: Sequence[int]) -> "Activations":
        """Returns the same rows with another leading shape."""
        partials, squares = self.partials, self.square_partials
        stored = list(leading)
        if self.repeats > 1:
            assert stored[-1] == -1 or stored[-1] % self.repeats == 0, "rows that share values are separated"
            stored[-1] = stored[-1] if stored[-1] == -1 else stored[-1] // self.repeats
        partials = partials.reshape(len(partials), *stored, partials.shape[-1])
        squares = None if squares is None else squares.reshape(*leading, squares.shape[-1])
        return dataclasses.replace(self, partials=partials, square_partials=squares)
