"""A Hugging Face checkpoint as a dense decoder: full precision, for comparison."""

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from grinqh_jax.hf.reader import HFCheckpoint
from grinqh_jax.model.decoder import Decoder


def load_decoder(checkpoint: HFCheckpoint, compute_dtype) -> Decoder:
    """The model with unquantized weights, all of it in memory.

    Args:
      checkpoint: see ``open_checkpoint``.
      compute_dtype: of hidden states and matrix products, float32 or bfloat16; kernels are cast to it.

    Raises:
      CheckpointError: a file vanished or changed since the checkpoint was opened.
    """
    tree = {key: jnp.asarray(checkpoint.read(key)) for key in checkpoint.parameters}
    return Decoder.from_tree(checkpoint.config, unflatten_dict(tree, sep="."), compute_dtype)
