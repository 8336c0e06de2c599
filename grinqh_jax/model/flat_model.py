"""A decoder packed into fewer arrays, so that jitted calls start sooner."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.partition import Partition
from grinqh_jax.model.stacks import unstacked

SMALL_BYTES = 1 << 15
"""Maximum size of an array that is stacked with others of its kind: norms, level gains, threshold tables."""


@jax.tree_util.register_pytree_node_class
class FlatModel:
    """A decoder that the jitted functions of ``engine`` take as an argument without delay.

    Every call of a jitted function flattens its arguments and handles their arrays one by one. For a module
    of 36 layers the first takes milliseconds, and the second a few microseconds for each of 870 arrays, while
    the GPU idles. A ``FlatModel`` is flattened once, and its small arrays, two thirds of all, are stacked
    into one array for each shape. Slicing the stacks takes the device almost no time.

    Attributes:
      arrays: The large arrays, then the stacks.
    """

    def __init__(self, model: Decoder):
        leaves, structure = jax.tree.flatten(model)
        kinds: dict[tuple, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if leaf.size * leaf.dtype.itemsize <= SMALL_BYTES:
                kind = leaf.shape, leaf.dtype.name, getattr(leaf, "sharding", None)
                kinds.setdefault(kind, []).append(i)
        stacks = tuple(tuple(members) for members in kinds.values() if len(members) > 1)
        stacked = {i for members in stacks for i in members}
        self.arrays = tuple(leaf for i, leaf in enumerate(leaves) if i not in stacked)
        self.arrays += tuple(_stacked([leaves[i] for i in members]) for members in stacks)
        specs = tuple(_spec(array) for array in self.arrays)
        self._form: tuple[Any, ...] = structure, stacks, specs, model.partition

    @property
    def partition(self) -> Partition | None:
        """How a mesh cuts the model; None for one device."""
        return self._form[-1]

    @property
    def module(self) -> Decoder:
        """The decoder, made of slices of the stacks, for use in a traced function."""
        structure, stacks, _, _ = self._form
        small = self.arrays[len(self.arrays) - len(stacks) :]
        members = [i for members in stacks for i in members]
        # Without the barrier XLA (jax 0.11.2) fuses each slice into its users, so that the kernels of every
        # layer differ and all of them must be compiled.
        slices = jax.lax.optimization_barrier([leaf for stack in small for leaf in unstacked(stack)])
        leaves = dict(zip(members, slices, strict=True))
        large = iter(self.arrays)
        return jax.tree.unflatten(
            structure, [leaves[i] if i in leaves else next(large) for i in range(structure.num_leaves)]
        )

    def tree_flatten(self):
        return self.arrays, self._form

    @classmethod
    def tree_unflatten(cls, form, arrays) -> "FlatModel":
        flat = object.__new__(cls)
        flat.arrays, flat._form = tuple(arrays), form
        return flat

    def partition_specs(self) -> "FlatModel":
        """Returns the model with the cut of each array on a mesh in its place (``sharding.program``)."""
        _, _, specs, _ = self._form
        return FlatModel.tree_unflatten(self._form, specs)


def decoder_of(model: Decoder | FlatModel) -> Decoder:
    """Returns the decoder of a flat model, or the decoder itself."""
    return model.module if isinstance(model, FlatModel) else model


def _spec(leaf: Any) -> PartitionSpec:
    """Returns how an array is cut among the devices of its mesh."""
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _stacked(arrays: list[Any]) -> Shaped[Array, "members *shape"]:
    """Stacks arrays of one shape ``[*shape]``; those on a mesh keep their cut."""
    sharding = getattr(arrays[0], "sharding", None)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return _stacking(sharding)(arrays)
    return _stacking(None)(arrays)


@functools.cache
def _stacking(sharding: NamedSharding | None) -> Any:
    return jax.jit(jnp.stack, out_shardings=sharding)
