"""Asymmetric integers with one scale and zero point for each group of inputs, which all baselines use.

A group is 128 consecutive input channels of one output: ``w ~ scale * (q - zero)`` with ``q`` and ``zero`` in
``0 ... 2**bits - 1``. The range of a group always covers 0, so a zero point exists.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

GROUP = 128
SCALE_BITS = 16


class Grid(NamedTuple):
    """Scales and zero points of groups, broadcastable to their weights."""

    scale: Float[Array, "..."]
    zero: Float[Array, "..."]


def bits_read(bits: int) -> float:
    """Returns the bits read per weight: its integer, and its share of a float16 scale and a zero point."""
    return bits + (SCALE_BITS + bits) / GROUP


def fit(w: Float[Array, "group *any"], bits: int, shrink: Float[Array, "..."] | float = 1.0) -> Grid:
    """Returns the grid, with float16 scales, that spans the values of each column and 0, times ``shrink``."""
    low = jnp.minimum(w.min(axis=0), 0) * shrink
    high = jnp.maximum(w.max(axis=0), 0) * shrink
    scale = ((high - low) / (2**bits - 1)).astype(jnp.float16).astype(jnp.float32)
    scale = jnp.where(scale > 0, scale, 1)
    return Grid(scale, jnp.clip(jnp.round(-low / scale), 0, 2**bits - 1))


def round_to(w: Float[Array, "*any n"], grid: Grid, bits: int) -> Float[Array, "*any n"]:
    """Rounds to the nearest values of the grid."""
    q = jnp.clip(jnp.round(w / grid.scale) + grid.zero, 0, 2**bits - 1)
    return grid.scale * (q - grid.zero)


def grouped(w: Float[Array, "k n"]) -> Float[Array, "g group n"]:
    """Cuts ``w`` into groups. Rows of zeros, which change no range, fill the last group."""
    k, n = w.shape
    return jnp.pad(w, ((0, -k % GROUP), (0, 0))).reshape(-1, GROUP, n)


def rtn(w: Float[Array, "k n"], bits: int) -> Float[Array, "k n"]:
    """Rounds every weight to the nearest value of the grid that spans its group."""
    cut = grouped(w)
    low, high = jnp.minimum(cut.min(axis=1), 0), jnp.maximum(cut.max(axis=1), 0)
    grid = fit(jnp.stack([low, high]), bits)
    grid = Grid(grid.scale[:, None], grid.zero[:, None])
    return round_to(cut, grid, bits).reshape(-1, w.shape[1])[: len(w)]
