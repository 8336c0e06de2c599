"""Selecting outputs or input channels of a nested weight, so that each device of a mesh has a part of it.

Both functions keep codes and scales as they are: a selected weight has the same value at every level. They
work on arrays, with any leading axes, so they serve ``NestedWeight`` and ``NestedExperts``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float16, Int, UInt32

from pallas_kernels import codes, layout
from pallas_kernels.x64 import without_x64

PADDING = -1
"""Index that selects a padding output or a padding channel."""


@without_x64
def select_outputs(
    planes: UInt32[Array, "*experts p k w"], scales: Float16[Array, "*experts g n"], outputs: Int[Array, "m"]
) -> tuple[UInt32[Array, "*experts p k w2"], Float16[Array, "*experts g n2"]]:
    """Returns planes and scales of a weight with some of the outputs, padded (see ``layout.padded_shape``).

    The outputs change their tiles, so all digits are unpacked and packed again, plane by plane.

    Args:
      planes: Planes of one weight, or of several.
      scales: Scales of the same weights.
      outputs: Index of each output in the given weight. Outputs may be in any order and may repeat.
        ``PADDING`` selects an output whose weights are 0.
    """
    _, stored = layout.padded_shape(1, outputs.shape[0])
    outputs = jnp.pad(outputs, (0, stored - outputs.shape[0]), constant_values=PADDING)
    positions = jnp.asarray(layout.digit_major_positions(scales.shape[-1]))[outputs]

    def repacked(plane: UInt32[Array, "k w"]) -> UInt32[Array, "k w2"]:
        digits = codes.unpack_digit_major(plane).astype(jnp.uint8).reshape(len(plane), -1)
        return codes.pack_digits(jnp.where(outputs < 0, 0, digits[:, positions]))

    return _each_plane(repacked, planes), jnp.where(outputs < 0, 0, scales[..., outputs])


@without_x64
def select_channels(
    planes: UInt32[Array, "*experts p k w"], scales: Float16[Array, "*experts g n"], channels: Int[Array, "m"]
) -> tuple[UInt32[Array, "*experts p k2 w"], Float16[Array, "*experts g2 n"]]:
    """Returns planes and scales of a weight with some of the input channels, padded to whole groups.

    Args:
      planes: Planes of one weight, or of several.
      scales: Scales of the same weights.
      channels: Index of each input channel in the given weight. The channels of each group of the result come
        from one group, because they share a scale. ``PADDING`` selects a channel whose digits are 0, which
        contributes nothing if its activation is 0.
    """
    groups = layout.round_up(channels.shape[0], layout.GROUP) // layout.GROUP
    channels = jnp.pad(channels, (0, groups * layout.GROUP - channels.shape[0]), constant_values=PADDING)
    group = jnp.max(channels.reshape(groups, layout.GROUP), axis=-1) // layout.GROUP  # -1 for padding alone

    def selected(plane: UInt32[Array, "k w"]) -> UInt32[Array, "k2 w"]:
        return jnp.where(channels[:, None] < 0, 0, plane[channels])

    return _each_plane(selected, planes), jnp.where(group[:, None] < 0, 0, scales[..., group, :])


def _each_plane(function: Callable[[jax.Array], jax.Array], planes: jax.Array) -> jax.Array:
    """Applies a function to one plane ``[k, w]`` after another, which bounds the memory that it needs."""
    flat = planes.reshape(-1, *planes.shape[-2:])
    changed = jax.lax.map(function, flat)
    return changed.reshape(*planes.shape[:-2], *changed.shape[1:])
