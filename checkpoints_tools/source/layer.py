"""A source checkpoint a piece at a time: the embedded windows, and one decoder layer, dense."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from grinqh_jax.model.apply import Dense
from grinqh_jax.model.decoder import DecoderLayer

WRITERS = ("o", "down")
"""Linear layers that write to the residual stream."""

BLOCK_VALUES = 1 << 24
"""Of an embedding or an output projection in memory at a time: 64 MiB as float32."""


def read_layer(source, i: int) -> tuple[dict[str, np.ndarray | Array], dict[str, np.ndarray]]:
    """``(kernels, norms)`` of layer ``i`` by part (``qkv``, ``input_norm``), in the dtype that is stored.

    Args:
      source: ``grinqh_jax.hf.HFCheckpoint``, or what reads like one.
      i: which layer.
    """
    prefix = f"layers.{i}."
    kernels, norms = {}, {}
    # Kernels first: a rotated checkpoint learns the norms from them.
    for key in sorted(source.parameters, key=lambda key: not key.endswith(".kernel")):
        if key.startswith(prefix):
            part, leaf = key.removeprefix(prefix).split(".")
            (kernels if leaf == "kernel" else norms)[part] = source.read(key)
    return kernels, norms


def dense_layer(
    source, kernels: dict[str, np.ndarray | Array], norms: dict[str, np.ndarray], compute_dtype
) -> DecoderLayer:
    """The layer that ``read_layer`` has read, ready to run."""
    tree = {part: {"kernel": kernel} for part, kernel in kernels.items()}
    tree |= {part: {"scale": jnp.asarray(scale)} for part, scale in norms.items()}
    return DecoderLayer(source.config, tree, compute_dtype)


@jax.jit
def run_layer(layer: DecoderLayer, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    """Takes the hidden states of a window through a dense layer."""
    return layer("layer", x[None], jnp.arange(len(x))[None], Dense())[0][0]


def embed(source, windows: Int32[np.ndarray, "s t"], dtype) -> Float[np.ndarray, "s t d"]:
    """Hidden states before the first layer; the embedding is read in blocks."""
    vocab, width = source.parameters["embed.embedding"]
    hidden = np.empty((*windows.shape, width), dtype)
    block = max(BLOCK_VALUES // width, 1)
    for start in range(0, vocab, block):
        here = (windows >= start) & (windows < start + block)
        if here.any():
            rows = np.asarray(source.read("embed.embedding", slice(start, min(start + block, vocab))))
            hidden[here] = rows[windows[here] - start]
    return hidden
