"""A source checkpoint in pieces: the embedded windows, and one dense decoder layer."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from grinqh_jax.model.apply import Dense
from grinqh_jax.model.decoder import DecoderLayer

VALUES_IN_MEMORY = 1 << 24
"""Number of values of an embedding or output projection in memory at once: 64 MiB as float32."""


def read_layer(source, i: int) -> tuple[dict[str, np.ndarray | Array], dict[str, np.ndarray]]:
    """Reads a layer in the stored dtype.

    Args:
      source: ``grinqh_jax.hf.HFCheckpoint``, or an object that reads like one.
      i: Index of the layer.

    Returns:
      ``(kernels, norms)``: kernels ``[in, out]`` by projection (``qkv``), and scales by norm
      (``input_norm``).
    """
    prefix = f"layers.{i}."
    kernels: dict[str, np.ndarray | Array] = {}
    norms: dict[str, np.ndarray] = {}
    # The kernels come first, because a rotated checkpoint computes the norms from them.
    for key in sorted(source.parameters, key=lambda key: not key.endswith(".kernel")):
        if key.startswith(prefix):
            name, leaf = key.removeprefix(prefix).split(".")
            if leaf == "kernel":
                kernels[name] = source.read(key)
            else:
                norms[name] = source.read(key)
    return kernels, norms


def dense_layer(
    source, kernels: dict[str, np.ndarray | Array], norms: dict[str, np.ndarray], compute_dtype
) -> DecoderLayer:
    """Builds the decoder layer that ``read_layer`` has read."""
    tree = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    tree |= {name: {"scale": jnp.asarray(scale)} for name, scale in norms.items()}
    return DecoderLayer(source.config, tree, compute_dtype)


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
    return hidden
