"""Runs a function of a model on all devices of its mesh, each with its part of the arrays."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grinqh_jax.model.partition import AXIS, Partition

Function = TypeVar("Function", bound=Callable[..., Any])

WHOLE = PartitionSpec()
"""Spec of an array that every device has."""

MOST_AXES = 8
"""Largest number of axes of a cut array."""


def on_mesh(function: Function) -> Function:
    """Decorates a function whose first argument is a model; goes below ``jax.jit``.

    If the model is on a mesh, the function runs inside ``jax.shard_map``: every device runs it on its parts
    of the arrays. A node of the arguments or of the result that has a method ``partition_specs`` says how its
    arrays are cut (``KVCache``). Every device has all other arrays, and computes equal ones. Arguments that
    are no arrays are passed as they are. On one device, and inside another decorated function, the function
    is called directly.
    """

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        partition = model.partition
        if partition is None or AXIS in jax.sharding.get_abstract_mesh().manual_axes:
            return function(model, *args, **kwargs)
        leaves, structure = jax.tree.flatten((model, args, kwargs))
        specs = jax.tree.leaves(partition_specs((model, args, kwargs)), is_leaf=_is_spec)
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
        result: list[Any] = []  # the structure of the result, and the cut axis of each leaf

        def body(arrays):
            given = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                given[i] = array
            inner_model, inner_args, inner_kwargs = jax.tree.unflatten(structure, given)
            returned = function(inner_model, *inner_args, **inner_kwargs)
            returned_leaves, returned_structure = jax.tree.flatten(returned)
            axes = [_cut_axis(spec) for spec in jax.tree.leaves(partition_specs(returned), is_leaf=_is_spec)]
            result[:] = [returned_structure, axes]
            # The leaves are grouped by axis, because ``shard_map`` must know the specs before it runs this.
            return [
                [leaf for leaf, cut in zip(returned_leaves, axes, strict=True) if cut == axis]
                for axis in _AXES
            ]

        groups = jax.shard_map(
            body,
            mesh=partition.mesh,
            in_specs=([specs[i] for i in traced],),
            out_specs=[WHOLE if axis is None else PartitionSpec(*[None] * axis, AXIS) for axis in _AXES],
            check_vma=False,
        )([leaves[i] for i in traced])
        returned_structure, axes = result
        grouped = {axis: iter(group) for axis, group in zip(_AXES, groups, strict=True)}
        return jax.tree.unflatten(returned_structure, [next(grouped[axis]) for axis in axes])

    return run  # type: ignore[return-value]  # wraps keeps the signature


_AXES = [None, *range(MOST_AXES)]


def partition_specs(tree: Any) -> Any:
    """Returns the tree with the spec of each leaf in its place (see ``on_mesh``)."""

    def has_specs(node: Any) -> bool:
        return hasattr(node, "partition_specs")

    return jax.tree.map(
        lambda node: node.partition_specs() if has_specs(node) else WHOLE, tree, is_leaf=has_specs
    )


def shardings(tree: Any, partition: Partition) -> Any:
    """Returns the tree with the sharding of each leaf on the mesh in its place."""
    return jax.tree.map(
        lambda spec: NamedSharding(partition.mesh, spec), partition_specs(tree), is_leaf=_is_spec
    )


def zeros_on_mesh(make: Callable[[], Any], partition: Partition | None) -> Any:
    """Returns ``make()``, a tree of zeros such as an empty cache, each device with its parts only.

    A program is compiled for each shape, and not for each call.
    """
    if partition is None:
        return make()
    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda leaf, sharding: _zeros(leaf.shape, leaf.dtype, sharding)(),
        shapes,
        shardings(shapes, partition),
    )


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def put(tree: Any, partition: Partition | None) -> Any:
    """Returns the tree with its arrays on the devices of the mesh; on one device, as it is."""
    return tree if partition is None else jax.device_put(tree, shardings(tree, partition))


def jit_of_parts(function: Function, partition: Partition | None) -> Function:
    """Compiles a function of modules that are parts of a model, such as a layer, as ``on_mesh`` does.

    The arrays of the modules say how they are cut, so the function must not be called with traced ones. It
    returns arrays that every device has.
    """
    if partition is None:
        return jax.jit(function)  # type: ignore[return-value]
    compiled: dict[Any, Any] = {}

    @functools.wraps(function)
    def run(*args):
        leaves, structure = jax.tree.flatten(args)
        specs = tuple(_spec_of(leaf) for leaf in leaves)
        if (structure, specs) not in compiled:
            compiled[structure, specs] = jax.jit(
                jax.shard_map(
                    lambda leaves: function(*jax.tree.unflatten(structure, leaves)),
                    mesh=partition.mesh,
                    in_specs=(list(specs),),
                    out_specs=WHOLE,
                    check_vma=False,
                )
            )
        return compiled[structure, specs](leaves)

    return run  # type: ignore[return-value]


def _spec_of(array: Any) -> PartitionSpec:
    sharding = getattr(array, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else WHOLE


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _cut_axis(spec: PartitionSpec) -> int | None:
    """Returns the axis that a spec cuts, or None."""
    return next((axis for axis, name in enumerate(spec) if name == AXIS), None)
