"""The part of a model that one device of a mesh has, as far as the modules must know it.

A model on a mesh is cut by tensor parallelism (arXiv 1909.08053): each device has some heads of every
attention, some channels of every MLP and some tokens of the output projection. ``sharding.rules`` decides
which. The modules compute with the sizes of one part, inside ``jax.shard_map``, and add up the results.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grinqh_jax.model.config import ModelConfig
from pallas_kernels import Activations, GradingStats
from pallas_kernels.exchange import Mailbox, MailboxRef, UnexchangedSums

AXIS = "tp"
"""Name of the mesh axis that weights are cut along."""

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
"""A mesh; an abstract one, without devices, suffices for shapes and memory."""


Exchange = Literal["kernel", "sum"]
"""How a decode step adds up the results of the devices (``Partition``)."""

ExchangeSetting = Literal["auto", "kernel", "sum"]
"""An ``Exchange``, or ``auto`` for ``kernel`` where the devices can run it and ``sum`` elsewhere."""

MOST_ROWS = 16
"""Largest number of rows that ``kernel`` exchanges; those of a prefill are large."""


@dataclasses.dataclass(frozen=True)
class InputCut:
    """The input channels that each device has of a projection whose outputs are summed over the devices.

    A group of 128 channels shares its scales, so a channel keeps its position in its group. Where the first
    channel of a device is not the first of a group, padding precedes it.

    Attributes:
      channels: Number of channels of each device.
      offsets: Number of padding channels before them.
      width: Number of channels of every part, padding included. The activations of padding are 0.
    """

    channels: tuple[int, ...]
    offsets: tuple[int, ...]
    width: int

    @property
    def shifts(self) -> bool:
        """Whether padding precedes the channels of some device."""
        return any(self.offsets)

    def offset(self) -> Int[Array, ""]:
        """Returns the offset of this device, inside ``shard_map``."""
        return jnp.asarray(self.offsets, jnp.int32)[jax.lax.axis_index(AXIS)]


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a model is cut among the devices of a mesh.

    Attributes:
      mesh: The mesh; its only axis is ``AXIS``.
      local: Configuration of the model with the heads and widths of one part.
      inputs: Cut of the inputs of a projection, by the name of their axis (``parameters.axis_sizes``).
      exchange: How a decode step adds up the results of the devices: ``kernel`` by kernels that write to
        the memory of all devices (``pallas_kernels.exchange``), ``sum`` by XLA's all-reduce.
    """

    mesh: AnyMesh
    local: ModelConfig
    inputs: tuple[tuple[str, InputCut], ...]
    exchange: Exchange = "sum"

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def whole(self) -> jax.sharding.NamedSharding:
        """Sharding of an array that every device has."""
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    def opened(self, rows: int) -> Mailbox | None:
        """Returns the memory for the exchanges of a program that decodes ``rows`` tokens in each step.

        None if XLA's collectives exchange them. The program calls this once, inside ``shard_map``.
        """
        if self.exchange != "kernel" or rows > MOST_ROWS:
            return None
        return Mailbox.open(self.devices, rows, self.local.hidden_size)

    def exchanged(
        self, parts: Activations, mailbox: MailboxRef | None = None
    ) -> Activations | UnexchangedSums:
        """Returns the sum of the results of all devices, inside ``shard_map``.

        If the mailbox holds them, the kernel that reads the sum exchanges them.
        """
        if mailbox is not None and mailbox.holds(parts):
            return UnexchangedSums(parts, mailbox)
        return parts.summed_across(AXIS)

    def input_cut(self, axis: str) -> InputCut | None:
        """Returns the cut of inputs along an axis; None if every device has all of them."""
        return dict(self.inputs).get(axis)


def whole_stats(
    parts: Mapping[str, GradingStats],
    at_zero: Mapping[str, Float[Array, "*rows"]],
    cuts: Mapping[str, InputCut],
) -> dict[str, GradingStats]:
    """Returns the statistics of linear layers from those of their parts, inside ``shard_map``.

    Args:
      parts: Statistics of this device's part, by layer name.
      at_zero: Bits that each row reads of a channel whose activation is 0, such as padding.
      cuts: Cut of the layers' inputs.
    """
    whole: dict[str, GradingStats] = {}
    for names in _of_equal_shape({name: stats.packed for name, stats in parts.items()}):
        packed = jax.lax.all_gather(jnp.stack([parts[name].packed for name in names]), AXIS)
        zero = jnp.stack([jnp.broadcast_to(at_zero[name], packed.shape[2:-1]) for name in names])
        bits = _whole_bits(packed[..., 0], zero, [cuts[name] for name in names])
        stats = jnp.stack([bits, jnp.max(packed[..., 1], axis=0)], axis=-1)
        whole |= {name: GradingStats(stats[i]) for i, name in enumerate(names)}
    return whole


def whole_bits(
    parts: Mapping[str, Float[Array, "*rows"]],
    at_zero: Mapping[str, Float[Array, "*#rows"]],
    cuts: Mapping[str, InputCut],
) -> dict[str, Float[Array, "*rows"]]:
    """Returns the mean bits of linear layers from those of their parts, as ``whole_stats`` does."""
    whole: dict[str, Float[Array, "*rows"]] = {}
    for names in _of_equal_shape(parts):
        gathered = jax.lax.all_gather(jnp.stack([parts[name] for name in names]), AXIS)
        zero = jnp.stack([jnp.broadcast_to(at_zero[name], gathered.shape[2:]) for name in names])
        bits = _whole_bits(gathered, zero, [cuts[name] for name in names])
        whole |= {name: bits[i] for i, name in enumerate(names)}
    return whole


def _whole_bits(
    parts: Float[Array, "devices layers *rows"], zero: Float[Array, "layers *rows"], cuts: list[InputCut]
) -> Float[Array, "layers *rows"]:
    """Returns the mean over the channels of all parts, without padding."""
    if all(cut.width * len(cut.channels) == sum(cut.channels) for cut in cuts):
        # XLA then removes ``zero``, whose sum over thresholds would be a kernel for every layer.
        return jnp.mean(parts, axis=0)
    sizes = np.array([(cut.width, len(cut.channels), sum(cut.channels)) for cut in cuts], np.float32)
    widths, devices, channels = sizes.T.reshape(3, -1, *(1,) * (zero.ndim - 1))
    padding = devices * widths - channels
    return (jnp.sum(parts, axis=0) * widths - zero * padding) / channels


def _of_equal_shape(arrays: Mapping[str, Float[Array, "*rows"]]) -> list[list[str]]:
    """Returns the names of arrays, grouped by shape."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, array in arrays.items():
        groups.setdefault(array.shape, []).append(name)
    return list(groups.values())
