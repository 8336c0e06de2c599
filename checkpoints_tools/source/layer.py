"""A source checkpoint in pieces: the embedded windows, and one dense decoder layer."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int, Int32

from grinqh_jax.model.decoder_layer import DecoderLayer

VALUES_IN_MEMORY = 1 << 24
"""Number of values of an embedding or output projection in memory at once: 64 MiB as float32."""


def read_layer(
    source, i: int, *, experts: bool = True
) -> tuple[dict[str, np.ndarray | Array], dict[str, np.ndarray]]:
    """Reads the parameters of a layer.

    Args:
      source: ``grinqh_jax.hf.HFCheckpoint``, or an object that reads like one.
      i: Index of the layer.
      experts: Whether to read the kernels of experts. If not, they are those of no experts, ``[0, in, out]``.

    Returns:
      ``(kernels, vectors)``: kernels by projection (``qkv``), ``[in, out]``, or of all experts as
      ``stacked_experts`` returns them; and what is not quantized, by name in the layer: norm scales, biases
      (``qkv.bias``), and the router.
    """
    prefix, projections = f"layers.{i}.", source.config.layers[i].names
    kernels: dict[str, np.ndarray | Array] = {}
    vectors: dict[str, np.ndarray] = {}
    # The kernels come first, because a rotated checkpoint computes the norms from them.
    for key in sorted(source.parameters, key=lambda key: not key.endswith(".kernel")):
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if (projection := name.removesuffix(".kernel")) in projections:
                if len(shape := source.parameters[key]) < 3:
                    kernels[projection] = source.read(key)
                else:
                    none = np.zeros((0, *shape[1:]), np.uint16)
                    kernels[projection] = stacked_experts(source, key) if experts else none
            else:
                vectors[name] = np.asarray(source.read(key))
    return kernels, vectors


def read_experts(source, key: str, first: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    """Reads the kernels ``[in, out]`` of up to ``count`` experts from ``first`` on, one after another."""
    experts = source.parameters[key][0]
    for expert in range(first, experts if count is None else min(first + count, experts)):
        yield np.asarray(source.read(key, slice(expert, expert + 1))[0])


def stacked_experts(source, key: str, first: int = 0, count: int | None = None) -> Array:
    """Reads the kernels of experts to the device, ``[experts, in, out]``, while the host holds one of them.

    Reads ``count`` experts from ``first`` on, by default all. Behind the last expert it puts zeros.

    Those of bfloat16 are uint16, their bits (``expert_products.Kernels``): XLA (jax 0.10.2) would write
    bfloat16 on a CPU in float32.
    """
    stack = None
    for expert, kernel in enumerate(read_experts(source, key, first, count)):
        kernel = kernel.view(np.uint16) if kernel.dtype == jnp.bfloat16 else kernel
        if stack is None:
            stack = jnp.zeros((count or source.parameters[key][0], *kernel.shape), kernel.dtype)
        stack = put_expert(stack, kernel, expert).block_until_ready()
    assert stack is not None, "a mixture has experts"
    return stack


@jax.jit(donate_argnums=0)
def put_expert(stack: Array, one: Array, expert: Int[Array, ""] | int) -> Array:
    """Replaces the array of one expert in place."""
    return stack.at[expert].set(one)


def each_expert(stack: Array | np.ndarray) -> Iterator[Float[Array, "k n"]]:
    """Yields the kernel of each expert in the result of ``stacked_experts``, in the checkpoint's dtype."""
    for expert in range(len(stack)):
        yield _of_expert(stack, expert)


@jax.jit
def _of_expert(stack: Array | np.ndarray, expert: Int[Array, ""] | int) -> Array:
    one = stack[expert]
    return jax.lax.bitcast_convert_type(one, jnp.bfloat16) if one.dtype == jnp.uint16 else one


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
