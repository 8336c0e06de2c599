"""Where the arguments of programs are: on the device of a model, or on the devices of its mesh."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Sharding

from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.partition import Partition
from grinqh_jax.sharding.program import shardings


@dataclasses.dataclass(frozen=True)
class Placement:
    """Puts arrays where the programs of a model have them.

    The sharding of an argument is the same from the first call on, because ``jit`` compiles again for another
    one.

    Attributes:
      sharding: Sharding of an array that every device has.
      partition: How a mesh cuts the model; None for one device.
      abstract: Whether ``put`` allocates nothing, and returns shapes.
    """

    sharding: Sharding
    partition: Partition | None
    abstract: bool = False

    @classmethod
    def of_model(cls, model: Decoder, abstract: bool = False) -> "Placement":
        """Returns the placement of the arguments of a model's programs."""
        return cls(model.norm.scale[...].sharding, model.partition, abstract)

    def put(self, arrays: Any) -> Any:
        """Puts a tree of arrays on the device, or on those of the mesh."""
        if self.abstract:
            return self.structs(arrays)
        # A tree of shardings takes the host longer than one.
        return jax.device_put(arrays, self.sharding if self.partition is None else self._shardings(arrays))

    def structs(self, arrays: Any) -> Any:
        """Returns shapes and dtypes with the shardings that ``put`` gives to the arrays."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            arrays,
            self._shardings(arrays),
        )

    def _shardings(self, arrays: Any) -> Any:
        if self.partition is not None:
            return shardings(arrays, self.partition)
        return jax.tree.map(lambda leaf: self.sharding, arrays)
