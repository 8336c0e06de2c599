"""Version 1 of the format: its shapes, and the change of its arrays to the present version.

Version 1 pads the outputs of every linear layer to whole tiles of 512. Version 2 may store fewer pieces in
the last tile (see ``pallas_kernels.layout``), where the outputs have another order. All other arrays are the
same.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from pallas_kernels import layout

OUTPUTS_IN_LAST_AXIS = {"planes": layout.WORD_DIGITS, "scales": 1}
"""Outputs in each element of the last axis, by the name of the leaf; no other leaf is padded to tiles."""


def stored_tree(tree: Mapping[str, Any], version: int) -> Mapping[str, Any]:
    """Returns the state tree that a version of the format stores.

    Args:
      tree: State tree of the present version, nested dicts of ``jax.ShapeDtypeStruct``
        (``decoder.abstract_tree``).
      version: One of ``quantization.READABLE_VERSIONS``.
    """
    return jax.tree.map_with_path(_stored_leaf, tree) if version == 1 else tree


def _stored_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    outputs = OUTPUTS_IN_LAST_AXIS.get(path[-1].key)
    if outputs is None:
        return leaf
    *others, size = leaf.shape
    return jax.ShapeDtypeStruct((*others, layout.round_up(size, layout.TILE // outputs)), leaf.dtype)


def upgraded(
    name: str, array: Shaped[np.ndarray, "*any"], leaf: jax.ShapeDtypeStruct
) -> Shaped[np.ndarray, "*any2"]:
    """Returns an array of version 1 as the present version stores it.

    Args:
      name: Dotted name of the leaf.
      array: Array of version 1, with the shape of ``stored_tree``.
      leaf: The same leaf of the present version.
    """
    if array.shape == leaf.shape:
        return array
    if name.endswith(".scales"):
        return array[..., : leaf.shape[-1]]
    pieces = layout.last_tile_pieces(leaf.shape[-1] * layout.WORD_DIGITS)
    last = leaf.shape[-1] - pieces * layout.PIECE // layout.WORD_DIGITS
    upgraded = np.empty(leaf.shape, array.dtype)
    upgraded[..., :last] = array[..., :last]
    for old, new in zip(array[..., last:], upgraded[..., last:], strict=True):  # One plane after another.
        new[...] = _narrower_tile(old, pieces)
    return upgraded


def _narrower_tile(words: Shaped[np.ndarray, "k 32"], pieces: int) -> Shaped[np.ndarray, "k w"]:
    """Returns the first ``pieces`` pieces of a whole tile in the order of a tile that has no others."""
    shifts = np.arange(layout.WORD_DIGITS, dtype=np.uint32) * layout.DIGIT_BITS
    digits = ((words[..., None] >> shifts) & 3).reshape(len(words), layout.TILE)
    outputs = layout.tile_positions(pieces).argsort()  # At each position of the narrower tile.
    narrower = digits[:, layout.tile_positions()[outputs]].reshape(len(words), -1, layout.WORD_DIGITS)
    return np.bitwise_or.reduce(narrower << shifts, axis=-1)
