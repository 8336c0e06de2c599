"""A decoder as few arrays, for functions that are called with it again and again."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.stacks import unstacked

SMALL_BYTES = 1 << 15
"""Arrays up to this size travel stacked with others of their kind: norms, gains, tables of thresholds."""


@jax.tree_util.register_pytree_node_class
class FlatModel:
    """A decoder for the functions of ``engine``, which a call hands over in a fraction of the time.

    Flattening a module of 36 layers takes milliseconds at every call, and so does each of its 870 arrays a
    few microseconds, while a GPU stands still. This one is flattened once, and its small arrays, two thirds
    of all, are stacked to one for each shape. Slicing them takes the device next to nothing.

    Attributes:
      arrays: the large ones as they are, then the stacks.
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
        self.arrays += tuple(_stack([leaves[i] for i in members]) for members in stacks)
        self._form = structure, stacks

    @property
    def module(self) -> Decoder:
        """The decoder, of slices of the stacks: for use in a traced function."""
        structure, stacks = self._form
        small = self.arrays[len(self.arrays) - len(stacks) :]
        members = [i for members in stacks for i in members]
        # Behind a barrier: fused into what uses it, each slice would make the kernels of every layer
        # different, and all of them would have to be compiled.
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


@jax.jit
def _stack(arrays: list[Shaped[Array, "*shape"]]) -> Shaped[Array, "members *shape"]:
    return jnp.stack(arrays)
