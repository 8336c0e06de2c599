"""How each axis of a model's weights is cut among the devices of a mesh.

The rules belong to the axes that ``layer_spec`` names, so they serve every projection, whichever layer it
belongs to. A projection that reads the residual stream is cut by its outputs, and one that writes to the
stream by its inputs: the sum over the devices is the only exchange of a residual block.

* Query heads are cut evenly, and key and value heads with them. If there are more devices than key heads,
  several devices have the same one. The gate of a query head goes with it.
* The value heads of a gated delta net are cut evenly, and its key heads with them, in the same way. The
  convolution is cut by the channels of these heads.
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
from grinqh_jax.model.layer_spec import DeltaHeads, Projection
from grinqh_jax.model.parameters import axis_sizes, norms, projections
from grinqh_jax.model.partition import AnyMesh, Exchange, ExchangeSetting, InputCut, Partition
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


def _gated_query(config: ModelConfig, devices: int) -> Indices:
    return _heads(config.num_heads // devices, config.num_heads, 2 * config.head_dim, devices)


def _delta_keys(config: ModelConfig, devices: int) -> Indices:
    heads = _delta(config)
    return _heads(max(heads.key_heads // devices, 1), heads.key_heads, heads.key_dim, devices)


def _delta_values(config: ModelConfig, devices: int, width: int) -> Indices:
    """Returns the channels of the value heads of each device, ``width`` for each head."""
    heads = _delta(config).value_heads
    return _heads(heads // devices, heads, width, devices)


def _delta_qkv(config: ModelConfig, devices: int) -> Indices:
    heads, keys = _delta(config), _delta_keys(config, devices)
    all_keys = heads.key_heads * heads.key_dim
    values = _delta_values(config, devices, heads.value_dim)
    return np.concatenate([keys, keys + all_keys, values + 2 * all_keys], axis=1).astype(np.int32)


def _delta(config: ModelConfig) -> DeltaHeads:
    assert config.delta_heads is not None, "gated delta nets have heads"
    return config.delta_heads


def _groups(size: int, devices: int) -> Indices:
    """Returns the channels of each device in whole groups, as evenly as possible."""
    groups = -(-size // GROUP)
    counts = [groups // devices + (device < groups % devices) for device in range(devices)]
    ends = np.minimum(np.cumsum(counts) * GROUP, size)
    starts = np.concatenate([[0], ends[:-1]])
    indices = starts[:, None] + np.arange(np.max(ends - starts))
    return np.where(indices < ends[:, None], indices, PADDING).astype(np.int32)


def head_indices(config: ModelConfig, devices: int) -> Indices:
    """Returns the query heads that each device has."""
    return _heads(config.num_heads // devices, config.num_heads, 1, devices)


CUTS: dict[str, Callable[[ModelConfig, int], Indices]] = {
    "query": _query,
    "gated_query": _gated_query,
    "key_value": _key_value,
    "delta_qkv": _delta_qkv,
    "delta_value": lambda config, devices: _delta_values(config, devices, _delta(config).value_dim),
    "delta_heads": lambda config, devices: _delta_values(config, devices, 1),
    "intermediate": lambda config, devices: _groups(config.intermediate_size, devices),
    "expert": lambda config, devices: _groups(config.expert_size, devices),
}
"""The cut of each axis that can be cut (``parameters.axis_sizes``)."""

WHOLE = ("hidden", "head", "delta_head", "experts")
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
    indices = np.arange(devices * width).reshape(devices, width)
    return np.where(indices < size, indices, PADDING).astype(np.int32)


def partition(config: ModelConfig, mesh: AnyMesh, exchange: ExchangeSetting = "auto") -> Partition:
    """Returns how a model is cut among the devices of a mesh, and how they exchange results.

    ``auto`` chooses the exchange by measurement: the kernel was faster than XLA's sum in all cases
    (``docs/sharding.md``).

    Raises:
      UsageError: The model cannot be cut among so many devices, or they cannot exchange in this way. The
        message names all reasons.
    """
    devices = mesh.size
    problems = obstacles(config, devices)
    reason = None if exchange == "sum" else exchange_kernel.unsupported_reason(mesh)
    if exchange == "kernel" and reason is not None:
        problems.append(f'the exchange "kernel" {reason}; choose "auto" or "sum"')
    if problems:
        raise UsageError(f"--mesh tp={devices}: " + "; ".join(problems))

    def width(axis: str) -> int:
        return CUTS[axis](config, devices).shape[1]

    delta = config.delta_heads
    if delta is not None:
        key_heads, value_heads = max(delta.key_heads // devices, 1), width("delta_heads")
        delta = dataclasses.replace(delta, key_heads=key_heads, value_heads=value_heads)
    local = dataclasses.replace(
        config,
        num_heads=width("query") // config.head_dim,
        num_kv_heads=width("key_value") // config.head_dim,
        intermediate_size=width("intermediate"),
        expert_size=width("expert") if config.expert_size else 0,
        delta_heads=delta,
    )
    axes = dict.fromkeys(projection.inputs for projection in projections(config).values())
    inputs = tuple((axis, _input_cut(config, axis, devices)) for axis in axes if axis not in WHOLE)
    chosen: Exchange = "sum" if exchange == "sum" or reason is not None else "kernel"
    return Partition(mesh, local, inputs, chosen)


def _input_cut(config: ModelConfig, axis: str, devices: int) -> InputCut:
    indices = input_indices(config, axis, devices)
    assert indices is not None, "the axis is cut"
    channels = np.sum(indices != PADDING, axis=1)
    offsets = np.where(channels > 0, np.argmax(indices != PADDING, axis=1), 0)
    return InputCut(tuple(channels.tolist()), tuple(offsets.tolist()), indices.shape[1])


def obstacles(config: ModelConfig, devices: int) -> list[str]:
    """Returns why a model cannot be cut among ``devices`` devices, one reason each."""
    heads = {"query heads": (config.num_heads, config.num_kv_heads)}
    if (delta := config.delta_heads) is not None:
        heads["value heads of gated delta nets"] = delta.value_heads, delta.key_heads
    numbers = range(2, config.num_heads + 1)
    fitting = [str(n) for n in numbers if all(_divides(*pair, n) for pair in heads.values())]
    problems = [
        f"{pair[0]} {kind} and {pair[1]} key heads cannot be divided among {devices} devices; choose "
        f"{' or '.join(fitting) or 'one device'}"
        for kind, pair in heads.items()
        if not _divides(*pair, devices)
    ]
    known = {*CUTS, *WHOLE}
    for name, projection in projections(config).items():
        unknown = [axis for axis in (projection.inputs, *projection.outputs) if axis not in known]
        problems += [
            f"{name}: no rule cuts its axis {axis}; run this model on one device" for axis in unknown
        ]
    unknown_norms = [name for name, norm in norms(config).items() if norm.axis not in known]
    problems += [f"{name}: no rule cuts this norm; run this model on one device" for name in unknown_norms]
    return problems


def _divides(heads: int, shared: int, devices: int) -> bool:
    """Whether devices divide heads evenly, so that each has whole groups of heads that share one."""
    return heads % devices == 0 and (shared % devices == 0 or devices % shared == 0)
