"""Loads a Hugging Face checkpoint as a dense decoder at full precision, for comparison."""

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from grinqh_jax.hf.reader import HFCheckpoint
from grinqh_jax.model.decoder import Decoder


def load_decoder(checkpoint: HFCheckpoint, compute_dtype) -> Decoder:
    """Loads the whole model into memory with unquantized weights.

    Args:
      checkpoint: Result of ``open_checkpoint``.
      compute_dtype: Dtype of hidden states and matrix products, float32 or bfloat16. Kernels, except those of
        experts, are cast to it.

    Raises:
      CheckpointError: A file vanished or changed since the checkpoint was opened.
    """
    tree = {key: jnp.asarray(checkpoint.read(key)) for key in checkpoint.parameters}
    return Decoder.from_tree(checkpoint.config, unflatten_dict(tree, sep="."), compute_dtype)
