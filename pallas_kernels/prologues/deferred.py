"""A row of activations that the product that reads it computes from the results of earlier launches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activations
from pallas_kernels.lanes.instructions import Instructions, Value

Prologue = Literal["attention", "swiglu"]
"""Work that a product can do in its prologue: merging the splits of attention, or SwiGLU."""


class Source(Protocol):
    """How to compute a row from arrays. Instances are static and hashable."""

    @property
    def features(self) -> int:
        """Number of features of the row."""
        ...

    def load(self, isa: Instructions, refs: Sequence[Any], channels: list[Value], span: int) -> Any:
        """Loads what the lane needs for its channels, in the order of the program.

        Args:
          isa: The instructions.
          refs: The arrays of ``Deferred``.
          channels: Channels of the lane. Neighbouring lanes have neighbouring channels.
          span: Number of consecutive channels, the first a multiple of it, that contain all channels of the
            warp; 0 if no such number is known.

        Returns:
          Registers, for ``combine``.
        """
        ...

    def combine(self, isa: Instructions, loaded: Any) -> list[Value]:
        """Returns the row at the lane's channels in ``f32``, rounded to bfloat16."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """One row of bfloat16 activations, ``[1, 1, features]``, not computed yet.

    Attributes:
      arrays: Results of earlier launches.
      source: How to compute the row from them.
      launch: Function of source and arrays that computes the row in a separate launch, with the same bits.
    """

    arrays: tuple[jax.Array, ...]
    source: Source = dataclasses.field(metadata={"static": True})
    launch: Callable[..., Activations] = dataclasses.field(metadata={"static": True})

    @property
    def leading(self) -> tuple[int, ...]:
        """Shape of the row without its last axis."""
        return (1, 1)

    @property
    def features(self) -> int:
        """Number of features."""
        return self.source.features

    def abstract(self) -> Activations:
        """Returns activations of the row's shape and dtype without values, as one row ``[1, features]``."""
        row = jax.ShapeDtypeStruct((1, self.features), jnp.bfloat16)
        return jax.eval_shape(Activations.of, row)

    @property
    def array(self) -> Float[Array, "1 1 features"]:
        """The row, computed in a separate launch."""
        return self.finished().array

    def finished(self) -> Activations:
        """Computes the row in a separate launch."""
        return self.launch(self.source, self.arrays)


def rounded(isa: Instructions, number: Value) -> Value:
    """Rounds ``f32`` to the nearest bfloat16, ties to even."""
    return isa.bits_to_float(isa.pack_bfloat16(number, number) << 16)
