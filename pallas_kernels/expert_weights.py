"""The nested weights of the experts of a mixture: one weight for each expert, all of the same shape."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int

from pallas_kernels.weight import NestedWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NestedExperts:
    """Weights ``W[expert, in_features, out_features]``, each stored as a ``NestedWeight``.

    Attributes:
      planes: uint32 ``[E, P, K, N // 16]``.
      scales: float16 ``[E, K // 128, N]``.
      in_features: Logical K, static under ``jit``.
      out_features: Logical N, static under ``jit``.
      level_gains: float32 ``[P]``, the same for all experts; None means that all are 1.
    """

    planes: jax.Array
    scales: jax.Array
    in_features: int = dataclasses.field(metadata={"static": True})
    out_features: int = dataclasses.field(metadata={"static": True})
    level_gains: jax.Array | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts ``E``."""
        return self.planes.shape[0]

    @property
    def num_planes(self) -> int:
        """Number of stored planes ``P``, which is also the highest level."""
        return self.planes.shape[1]

    @classmethod
    def abstract(
        cls, num_experts: int, in_features: int, out_features: int, max_bits: int = 8
    ) -> "NestedExperts":
        """Returns weights of ``jax.ShapeDtypeStruct`` leaves: the shapes and dtypes that a checkpoint holds.

        Raises:
          ValueError: ``max_bits`` is not 2, 4, 6 or 8.
        """
        one = NestedWeight.abstract(in_features, out_features, max_bits)

        def stacked(leaf) -> Any:
            return jax.ShapeDtypeStruct((num_experts, *leaf.shape), leaf.dtype)

        return cls(stacked(one.planes), stacked(one.scales), in_features, out_features, one.level_gains)

    def expert(self, index: int | Int[Array, ""]) -> NestedWeight:
        """Returns the weight of one expert. Under ``jit`` the index may be traced; XLA then copies it."""
        arrays = self.planes[index], self.scales[index]
        return NestedWeight(*arrays, self.in_features, self.out_features, self.level_gains)
