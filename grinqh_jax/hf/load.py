"""Loads a Hugging Face checkpoint as a dense decoder at full precision, for comparison."""

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from grinqh_jax.hf.reader import HFCheckpoint
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.partition import ExchangeSetting
from grinqh_jax.sharding.cutting import cut_leaves, even_sharding
from grinqh_jax.sharding.rules import partition


def load_decoder(
    checkpoint: HFCheckpoint,
    compute_dtype,
    mesh: jax.sharding.Mesh | None = None,
    exchange: ExchangeSetting = "auto",
) -> Decoder:
    """Loads the whole model into memory with unquantized weights.

    Args:
      checkpoint: Result of ``open_checkpoint``.
      compute_dtype: Dtype of hidden states and matrix products, float32 or bfloat16. Kernels, except those of
        experts, are cast to it.
      mesh: Mesh to cut the model among; None for one device. The host holds one array of the model, and each
        device an even share of it until the array is cut.
      exchange: How a decode step adds up the results of the devices (``partition.ExchangeSetting``).

    Raises:
      UsageError: The mesh does not fit the model.
      CheckpointError: A file vanished or changed since the checkpoint was opened.
    """
    if mesh is not None:
        leaves: dict[str, jax.Array] = {}
        cut = partition(checkpoint.config, mesh, exchange)
        for key in checkpoint.parameters:
            array = checkpoint.read(key)
            on_mesh = jax.device_put(array, even_sharding(array.shape, mesh))
            leaves |= cut_leaves(checkpoint.config, {key: on_mesh}, cut)
        return Decoder.from_tree(checkpoint.config, unflatten_dict(leaves, sep="."), compute_dtype, cut)
    tree = {key: jnp.asarray(checkpoint.read(key)) for key in checkpoint.parameters}
    return Decoder.from_tree(checkpoint.config, unflatten_dict(tree, sep="."), compute_dtype)
