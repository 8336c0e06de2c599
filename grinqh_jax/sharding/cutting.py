"""Cuts the arrays of a model into the parts of the devices of a mesh, on the devices, one after another.

The arrays may come from anywhere: read from a checkpoint, each device an even share (``even_sharding``), or
made on one device. A cut array is one global array: the parts of all devices side by side.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, checkpoint_leaves
from grinqh_jax.model.layer_spec import HEAD, SINKS
from grinqh_jax.model.output_projection import block_shapes, block_sizes
from grinqh_jax.model.parameters import norms, projections
from grinqh_jax.model.partition import AXIS, AnyMesh, ExchangeSetting, Partition
from grinqh_jax.sharding.rules import (
    CUTS,
    WHOLE,
    Indices,
    head_indices,
    input_indices,
    output_indices,
    partition,
    vocabulary_indices,
)
from pallas_kernels.selection import PADDING, select_channels, select_outputs

Leaf = Any
"""A jax array, a numpy array or a ``jax.ShapeDtypeStruct``."""


DELTA_PARAMETERS = {
    "convolution": ("delta_qkv", -3),
    "log_decay": ("delta_heads", -1),
    "step_bias": ("delta_heads", -1),
}
"""Name and position of the cut axis of the parameters of a gated delta net beside its projections."""


def cut_decoder(model: Decoder, mesh: jax.sharding.Mesh, exchange: ExchangeSetting = "auto") -> Decoder:
    """Returns a model on a mesh, made of the arrays of a model on one device, which stays as it is.

    Raises:
      UsageError: The model cannot be cut among so many devices.
    """
    cut = partition(model.config, mesh, exchange)
    leaves = checkpoint_leaves(model)
    if not model.graded:  # Its output projection is one block, and has another name in a tree.
        leaves[f"{HEAD}.kernel"] = leaves.pop(f"{HEAD}.blocks.0.kernel")
    leaves = cut_leaves(model.config, leaves, cut)
    tree = traverse_util.unflatten_dict(leaves, sep=".")
    return Decoder.from_tree(model.config, tree, model.compute_dtype, cut)


def cut_leaves(config: ModelConfig, leaves: Mapping[str, Leaf], cut: Partition) -> dict[str, Leaf]:
    """Returns the leaves of a model on a mesh.

    Args:
      config: Configuration of the model.
      leaves: Arrays of the whole model by dotted name (``decoder.abstract_tree``, or with dense kernels). If
        it is a dict, each array is removed when it is cut, so that memory holds one array twice at most. Of
        ``jax.ShapeDtypeStruct``, the result has the shapes and shardings.
      cut: How the model is cut.
    """
    result: dict[str, Leaf] = {}
    for name in list(leaves):
        if name in result:
            continue
        module, _, kind = name.rpartition(".")
        names = [f"{module}.planes", f"{module}.scales"] if kind in ("planes", "scales") else [name]
        arrays = [leaves.pop(each) if isinstance(leaves, dict) else leaves[each] for each in names]
        indices, axis = _indices(config, module, kind, cut.devices)
        result |= zip(names, _cut(arrays, indices, axis, cut), strict=True)
    if (columns := f"{HEAD}.columns") in result:
        result[columns] = _cut_columns(config, result[columns], cut)
    return {name: result[name] for name in result}


def _indices(config: ModelConfig, module: str, kind: str, devices: int) -> tuple[Indices | None, int]:
    """Returns how a leaf is cut: the elements of each device along an axis, and the axis.

    The axis counts from the end. Axis 0 is that of a bias of partial sums, which the first device alone has.
    """
    if kind == SINKS:
        return head_indices(config, devices), -1
    if (axis := DELTA_PARAMETERS.get(kind)) is not None:
        name, position = axis
        return CUTS[name](config, devices), position
    if kind not in ("planes", "scales", "kernel", "bias", "scale"):
        return None, -1
    if kind == "scale":
        norm_axis = norms(config)[module].axis
        return (None if norm_axis in WHOLE else CUTS[norm_axis](config, devices)), -1
    if module == HEAD:
        return vocabulary_indices(config.vocab_size, devices), -1
    if module.startswith(HEAD):
        _, size = block_shapes(config.hidden_size, config.vocab_size)[module]
        return vocabulary_indices(size, devices), -1
    projection = projections(config).get(module)
    if projection is None:  # a router
        return None, -1
    outputs = output_indices(config, projection, devices)
    if outputs is not None:
        return outputs, -1
    inputs = input_indices(config, projection.inputs, devices)
    return inputs, 0 if kind == "bias" else -2


def even_sharding(shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """Returns a sharding with an even share of an array on each device, or the whole if none is even."""
    axes = [axis for axis, size in enumerate(shape) if size % mesh.size == 0 and size > 1]
    longest = max(axes, key=lambda axis: shape[axis], default=None)
    spec = () if longest is None else (*[None] * longest, AXIS)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _cut(arrays: list[Leaf], indices: Indices | None, axis: int, cut: Partition) -> list[Leaf]:
    """Returns arrays that are cut in the same way."""
    if indices is None:
        return [_placed(array, cut.whole) for array in arrays]
    program = _program(cut.mesh, axis, len(arrays))
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(program, arrays, jax.ShapeDtypeStruct(indices.shape, np.int32))
        specs = _specs(axis, [len(array.shape) for array in arrays])
        return [
            jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(cut.mesh, spec))
            for shape, spec in zip(shapes, specs, strict=True)
        ]
    # The barrier to the host keeps the arrays of later layers from piling up beside those that are cut.
    on_mesh = [_placed(array, even_sharding(array.shape, cut.mesh)) for array in arrays]
    return jax.block_until_ready(program(on_mesh, indices))


def _placed(array: Leaf, sharding: NamedSharding) -> Leaf:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return jax.device_put(array, sharding)


def _specs(axis: int, ndims: list[int]) -> list[PartitionSpec]:
    """Returns the specs of arrays that are cut along ``axis``, given their numbers of axes."""
    return [PartitionSpec(*[None] * (axis % ndim), AXIS) for ndim in ndims]


@functools.cache
def _program(mesh: AnyMesh, axis: int, count: int) -> Any:
    """Returns a jitted function from ``count`` arrays and indices ``[devices, m]`` to the cut arrays."""

    def part(arrays: list[jax.Array], indices: jax.Array) -> list[jax.Array]:
        own = indices[0]
        if axis == 0:
            first = jax.lax.axis_index(AXIS) == 0
            return [jnp.where(first, array, jnp.zeros_like(array)) for array in arrays]
        if count == 2:
            planes, scales = arrays
            select = select_outputs if axis == -1 else select_channels
            return list(select(planes, scales, own))
        shape = (-1, *(1,) * (-axis - 1))
        return [jnp.where(own.reshape(shape) == PADDING, 0, jnp.take(array, own, axis)) for array in arrays]

    def cut(arrays: list[jax.Array], indices: jax.Array) -> list[jax.Array]:
        specs = _specs(axis, [array.ndim for array in arrays])
        inputs = PartitionSpec(), PartitionSpec(AXIS)
        return jax.shard_map(part, mesh=mesh, in_specs=inputs, out_specs=specs, check_vma=False)(
            arrays, indices
        )

    return jax.jit(cut)


def _cut_columns(config: ModelConfig, columns: Leaf, cut: Partition) -> Leaf:
    """Returns ``token_to_output`` for outputs that are gathered from the devices (``OutputProjection``)."""
    if isinstance(columns, jax.ShapeDtypeStruct):
        return columns
    start, parts = 0, []
    for size in block_sizes(config.vocab_size):
        indices = vocabulary_indices(size, cut.devices)
        parts.append(np.where(indices == PADDING, PADDING, indices + start))
        start += size
    gathered = np.concatenate(parts, axis=1).reshape(-1)
    index = np.argsort(gathered[gathered != PADDING]).astype(np.int32)
    return jax.device_put(index[np.asarray(columns)], cut.whole)
