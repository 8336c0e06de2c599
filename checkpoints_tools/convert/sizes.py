"""The size of a checkpoint, in memory and on disk."""

import os
from pathlib import Path

import jax

from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.decoder import linear_shapes
from pallas_kernels import NestedWeight


def bits_per_weight_stored(source: HFCheckpoint, max_bits: int) -> float:
    """Returns the bits per weight of the linear layers in memory, scales and padding included."""
    shapes = linear_shapes(source.config).values()
    stored = sum(
        leaf.size * leaf.dtype.itemsize
        for shape in shapes
        for leaf in jax.tree.leaves(NestedWeight.abstract(*shape, max_bits))
    )
    return 8 * stored / sum(k * n for k, n in shapes)


def directory_bytes(directory: Path) -> int:
    """Returns the bytes of all files of a checkpoint."""
    return sum(os.path.getsize(file) for file in directory.rglob("*") if file.is_file())
