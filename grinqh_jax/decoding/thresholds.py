"""Interpolates thresholds for given mean bits, in the calibrated table of each linear layer."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.stacks import unstacked

Thresholds = Mapping[str, Float[Array, "*b p"]]
"""Thresholds of every row of the batch, by name of the linear layer. ``StackedThresholds`` is such a mapping,
and a single array as an argument of ``jit``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedThresholds(Mapping[str, Float[Array, "*b p"]]):
    """Thresholds of all linear layers: a mapping by name, and a single array as an argument of ``jit``.

    Attributes:
      rows: float32 ``[*b, linears, P]``.
      names: Names of the linear layers.
    """

    rows: Float[Array, "*b linears p"]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def by_name(self) -> dict[str, Float[Array, "*b p"]]:
        """Returns the thresholds as a dict, for traced functions (see ``stacks.unstacked``)."""
        return dict(zip(self.names, unstacked(jnp.moveaxis(self.rows, -2, 0)), strict=True))

    def __getitem__(self, name: str) -> Float[Array, "*b p"]:
        if name not in self.names:
            raise KeyError(name)
        return self.rows[..., self.names.index(name), :]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def interpolate(
    table: Float[Array, "t *any"],
    targets: Sequence[float] | Float[Array, "t"],
    bits: Float[Array, "*b"] | Sequence[float] | float | int,
) -> Float[Array, "..."]:
    """Returns thresholds for a mean of ``bits``: linear between the two nearest targets, clamped at the ends.

    Thresholds stay ascending along P, because the mean of ascending thresholds is ascending. ``bits`` may be
    traced.

    Args:
      table: Thresholds at each target, ``[T, P]`` for one layer, ``[T, linears, P]`` for several.
      targets: Mean bits of the table's rows, ascending, at least two.
      bits: Wanted mean bits, a scalar or one per row of a batch.
    """
    below, share = _position(targets, bits)
    share = share.reshape(share.shape + (1,) * (table.ndim - 1))
    return (1 - share) * table[below] + share * table[below + 1]


def interpolate_each(
    tables: Float[Array, "t linears p"], targets: Float[Array, "t"], bits: Float[Array, "b"]
) -> list[Float[Array, "b p"]]:
    """Returns the thresholds of each linear layer (see ``interpolate``), for traced functions.

    On a GPU this takes a few kernels, because XLA (jax 0.12) fuses the interpolations of all layers. If they
    were slices of one interpolated array, XLA would launch a kernel for each slice.
    """
    below, share = _position(targets, bits)
    share = share[:, None]
    layers = range(tables.shape[1])
    return [(1 - share) * tables[below, i] + share * tables[below + 1, i] for i in layers]


def _position(
    targets: Sequence[float] | Float[Array, "t"], bits: Float[Array, "*b"] | Sequence[float] | float | int
) -> tuple[Int[Array, "*b"], Float[Array, "*b"]]:
    """Returns the index of the next lower target, at most T - 2, and the weight of the target above it."""
    targets, bits = jnp.asarray(targets, jnp.float32), jnp.asarray(bits, jnp.float32)
    # Not a reduction, which XLA would compile to a separate kernel.
    below = sum(
        ((targets[i] <= bits).astype(jnp.int32) for i in range(1, len(targets) - 1)),
        jnp.zeros_like(bits, jnp.int32),
    )
    share = (bits - targets[below]) / (targets[below + 1] - targets[below])
    return below, jnp.clip(share, 0, 1)


def stacked_tables(model: Decoder) -> Float[Array, "t linears p"]:
    """Returns the threshold tables of a graded model, in the order of ``decoder.linear_names``."""
    return _stack([model.graded_linear(name).thresholds[...] for name in linear_names(model.config)])


def model_thresholds(
    model: Decoder, targets: Float[Array, "t"], bits: Float[Array, "*b"]
) -> StackedThresholds:
    """Interpolates the thresholds of every linear layer of a graded model (see ``interpolate``)."""
    rows = _interpolate(stacked_tables(model), targets, bits)
    return StackedThresholds(rows, tuple(linear_names(model.config)))


# Both are jitted, so that each request dispatches one program for all linear layers and not one per layer.
@jax.jit
def _stack(tables: list[Float[Array, "t p"]]) -> Float[Array, "t linears p"]:
    return jnp.stack(tables, axis=1)


_interpolate = jax.jit(interpolate)
