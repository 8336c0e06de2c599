"""A source checkpoint in pieces: the embedded windows, and one dense decoder layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int32

from grinqh_jax.model.apply import Dense
from grinqh_jax.model.decoder_layer import DecoderLayer

VALUES_IN_MEMORY = 1 << 24
"""Number of values of an embedding or output projection in memory at once: 64 MiB as float32."""


def read_layer(source, i: int) -> tuple[dict[str, np.ndarray | Array], dict[str, np.ndarray]]:
    """Reads the parameters of a layer.

    Args:
      source: ``grinqh_jax.hf.HFCheckpoint``, or an object that reads like one.
      i: Index of the layer.

    Returns:
      ``(kernels, vectors)``: kernels ``[in, out]``, or ``[experts, in, out]``, by projection (``qkv``); and
      what is not quantized, by name in the layer: norm scales, biases (``qkv.bias``), and the router.
    """
    prefix, projections = f"layers.{i}.", source.config.layers[i].names
    kernels: dict[str, np.ndarray | Array] = {}
    vectors: dict[str, np.ndarray] = {}
    # The kernels come first, because a rotated checkpoint computes the norms from them.
    for key in sorted(source.parameters, key=lambda key: not key.endswith(".kernel")):
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if (projection := name.removesuffix(".kernel")) in projections:
                kernels[projection] = source.read(key)
            else:
                vectors[name] = np.asarray(source.read(key))
    return kernels, vectors


def dense_layer(
    source,
    i: int,
    kernels: dict[str, np.ndarray | Array],
    vectors: dict[str, np.ndarray],
    compute_dtype,
) -> DecoderLayer:
    """Builds the decoder layer whose parameters ``read_layer`` has read."""
    leaves = {f"{name}.kernel": kernel for name, kernel in kernels.items()}
    leaves |= {name: jnp.asarray(vector) for name, vector in vectors.items()}
    config = source.config
    return DecoderLayer(config, config.layers[i], unflatten_dict(leaves, sep="."), compute_dtype)


@jax.jit
def run_layer(layer: DecoderLayer, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    """Runs the hidden states of a window through a dense layer."""
    return layer("layer", x[None], jnp.arange(len(x))[None], Dense())[0][0]


def embed(source, windows: Int32[np.ndarray, "s t"], dtype) -> Float[np.ndarray, "s t d"]:
    """Returns the hidden states before the first layer, reading the embedding in ranges of tokens."""
    vocab, width = source.parameters["embed.embedding"]
    hidden = np.empty((*windows.shape, width), dtype)
    size = max(VALUES_IN_MEMORY // width, 1)
    for start in range(0, vocab, size):
        in_range = (windows >= start) & (windows < start + size)
        if in_range.any():
            rows = np.asarray(source.read("embed.embedding", slice(start, min(start + size, vocab))))
            hidden[in_range] = rows[windows[in_range] - start]
    multiplier = source.config.embedding_multiplier
    if multiplier != 1:
        hidden *= np.asarray(multiplier, dtype)
    return hidden
