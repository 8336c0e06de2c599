"""How each axis of a model's weights is cut among the devices of a mesh.

The rules belong to the axes that ``layer_spec`` names, so they serve every projection, whichever layer it
belongs to. A projection that reads the residual stream is cut by its outputs, and one that writes to the
stream by its inputs: the sum over the devices is the only exchange of a residual block.

* Query heads are cut evenly, and key and value heads with them. If there are more devices than key heads,
  several devices have the same one.
* The channels of an MLP, or of an expert, are cut in whole groups of 128, because a group shares its scales.
  Some devices may have a group less than others; padding fills up their parts.
* The tokens of the output projection are cut evenly within each vocabulary block, up to padding.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from grinqh_jax.errors import UsageError
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import Projection
from grinqh_jax.model.parameters import axis_sizes, norms, projections
from grinqh_jax.model.partition import AnyMesh, Exchange, InputCut, Partition
from pallas_kernels import exchange as exchange_kernel
from pallas_kernels.layout import GROUP
from pallas_kernels.selection import PADDING

Indices = Int[np.ndarray, "devices width"]
"""For each device, the index of each element of its part in the whole axis, or ``PADDING``."""


def _heads(count: int, of: int, width: int, devices: int) -> Indices:
    """Returns the channels of the heads of each device.

    Args:
      count: Number of heads of a device.
      of: Number of heads of the model. If it is less than ``count * devices``, devices share heads.
      width: Channels of a head.
      devices: Number of devices.
    """
    first = np.arange(devices) * of // devices
    heads = first[:, None] + np.arange(count)
    return (heads[..., None] * width + np.arange(width)).reshape(devices, -1).astype(np.int32)


def _query(config: ModelConfig, devices: int) -> Indices:
    return _heads(config.num_heads // devices, config.num_heads, config.head_dim, devices)


def _key_value(config: ModelConfig, devices: int) -> Indices:
    heads = config.num_kv_heads
    return _heads(max(heads // devices, 1), heads, config.head_dim, devices)


def _groups(size: int, devices: int) -> Indices:
    """Returns the channels of each device in whole groups, as evenly as possible."""
    groups = -(-size // GROUP)
    counts = [groups // devices + (device < groups % devices) for device in range(devices)]
    ends = np.minimum(np.cumsum(counts) * GROUP, size)
    starts = np.concatenate([[0], ends[:-1]])
    places = starts[:, None] + np.arange(np.max(ends - starts))
    return np.where(places < ends[:, None], places, PADDING).astype(np.int32)


def head_indices(config: ModelConfig, devices: int) -> Indices:
    """Returns the query heads that each device has."""
    return _heads(config.num_heads // devices, config.num_heads, 1, devices)


CUTS: dict[str, Callable[[ModelConfig, int], Indices]] = {
    "query": _query,
    "key_value": _key_value,
    "intermediate": lambda config, devices: _groups(config.intermediate_size, devices),
    "expert": lambda config, devices: _groups(config.expert_size, devices),
}
"""The cut of each axis that can be cut (``parameters.axis_sizes``)."""

WHOLE = ("hidden", "head", "experts")
"""Axes that every device has as a whole."""


def output_indices(config: ModelConfig, projection: Projection, devices: int) -> Indices | None:
    """Returns the outputs of a projection that each device has; None if every device has all of them."""
    if all(axis in WHOLE for axis in projection.outputs):
        return None
    sizes, start, parts = axis_sizes(config), 0, []
    for axis in projection.outputs:
        indices = CUTS[axis](config, devices)
        parts.append(np.where(indices == PADDING, PADDING, indices + start))
        start += sizes[axis]
    return np.concatenate(parts, axis=1).astype(np.int32)


def input_indices(config: ModelConfig, axis: str, devices: int) -> Indices | None:
    """Returns the channels along an input axis that each device has; None if every device has all of them.

    Each channel keeps its position in its group, so padding may precede the channels of a device.
    """
    if axis in WHOLE:
        return None
    indices = CUTS[axis](config, devices)
    offsets = np.where(indices[:, 0] == PADDING, 0, indices[:, 0] % GROUP)
    if not offsets.any():
        return indices
    aligned = np.full((devices, indices.shape[1] + offsets.max()), PADDING, np.int32)
    for row, own, offset in zip(aligned, indices, offsets, strict=True):
        row[offset : offset + len(own)] = own
    return aligned


def vocabulary_indices(size: int, devices: int) -> Indices:
    """Returns the outputs of a vocabulary block of ``size`` tokens that each device has."""
    width = -(-size // devices)
    places = np.arange(devices * width).reshape(devices, width)
    return np.where(places < size, places, PADDING).astype(np.int32)


def partition(config: ModelConfig, mesh: AnyMesh, exchange: Exchange = "sum") -> Partition:
    """Returns how a model is cut among the devices of a mesh, and how they exchange results.

    Raises:
      UsageError: The model cannot be cut among so many devices, or they cannot exchange in this way. The
        message names all reasons.
    """
    devices = mesh.size
    problems = obstacles(config, devices)
    if exchange == "kernel" and (reason := exchange_kernel.unsupported_reason(devices)) is not None:
        problems.append(f'the exchange "kernel" {reason}; choose "sum"')
    if problems:
        raise UsageError(f"--mesh tp={devices}: " + "; ".join(problems))
    widths = {axis: CUTS[axis](config, devices).shape[1] for axis in CUTS}
    local = dataclasses.replace(
        config,
        num_heads=widths["query"] // config.head_dim,
        num_kv_heads=widths["key_value"] // config.head_dim,
        intermediate_size=widths["intermediate"],
        expert_size=widths["expert"] if config.expert_size else 0,
    )
    axes = dict.fromkeys(projection.inputs for projection in projections(config).values())
    inputs = tuple((axis, _input_cut(config, axis, devices)) for axis in axes if axis not in WHOLE)
    return Partition(mesh, local, inputs, exchange)


def _input_cut(config: ModelConfig, axis: str, devices: int) -> InputCut:
    indices = input_indices(config, axis, devices)
    assert indices is not None, "the axis is cut"
    channels = np.sum(indices != PADDING, axis=1)
    offsets = np.where(channels > 0, np.argmax(indices != PADDING, axis=1), 0)
    return InputCut(tuple(channels.tolist()), tuple(offsets.tolist()), indices.shape[1])


def obstacles(config: ModelConfig, devices: int) -> list[str]:
    """Returns why a model cannot be cut among ``devices`` devices, one reason each."""
    problems = []
    if not _divides_heads(config, devices):
        fitting = [str(n) for n in range(2, config.num_heads + 1) if _divides_heads(config, n)]
        problems.append(
            f"{config.num_heads} query heads and {config.num_kv_heads} key heads cannot be divided among "
            f"{devices} devices; choose {' or '.join(fitting) or 'one device'}"
        )
    known = {*CUTS, *WHOLE}
    for name, projection in projections(config).items():
        unknown = [axis for axis in (projection.inputs, *projection.outputs) if axis not in known]
        problems += [
            f"{name}: no rule cuts its axis {axis}; run this model on one device" for axis in unknown
        ]
    unknown_norms = [name for name, norm in norms(config).items() if norm.axis not in known]
    problems += [f"{name}: no rule cuts this norm; run this model on one device" for name in unknown_norms]
    return problems


def _divides_heads(config: ModelConfig, devices: int) -> bool:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return heads % devices == 0 and (kv_heads % devices == 0 or devices % kv_heads == 0)
