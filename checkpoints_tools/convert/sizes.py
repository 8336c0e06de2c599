"""The size of a checkpoint, in memory and on disk."""

import math
import os
from pathlib import Path

from flax.traverse_util import flatten_dict

from grinqh_jax.checkpoint.quantization import VERSION
from grinqh_jax.checkpoint.version_1 import stored_tree
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import abstract_tree
from grinqh_jax.model.weight_counts import weights_stored

WEIGHT_LEAVES = ("planes", "scales", "gains")


def bits_per_weight_stored(config: ModelConfig, max_bits: int, version: int = VERSION) -> float:
    """Returns the bits per weight of the linear layers in a checkpoint, scales and padding included.

    Args:
      config: Configuration of the model.
      max_bits: Bits of the stored codes.
      version: Version of the format.
    """
    leaves = flatten_dict(stored_tree(abstract_tree(config, max_bits, 2), version))
    stored = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for path, leaf in leaves.items()
        if path[-1] in WEIGHT_LEAVES
    )
    return 8 * stored / sum(weights_stored(config).values())


def directory_bytes(directory: Path) -> int:
    """Returns the bytes of all files of a checkpoint."""
    return sum(os.path.getsize(file) for file in directory.rglob("*") if file.is_file())
