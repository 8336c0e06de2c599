"""The size of a checkpoint, in memory and on disk."""

import os
from pathlib import Path

import jax

from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.decoder import linear_shapes, weights_stored
from pallas_kernels import NestedWeight


def bits_per_weight_stored(source: HFCheckpoint, max_bits: int) -> float:
    """Returns the bits per weight of the linear layers in memory, scales and padding included."""
    weights = weights_stored(source.config)
    stored = 0
    for name, (k, n) in linear_shapes(source.config).items():
        matrices = weights[name] // (k * n)
        leaves = jax.tree.leaves(NestedWeight.abstract(k, n, max_bits))
        stored += matrices * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return 8 * stored / sum(weights.values())


def directory_bytes(directory: Path) -> int:
    """Returns the bytes of all files of a checkpoint."""
    return sum(os.path.getsize(file) for file in directory.rglob("*") if file.is_file())
