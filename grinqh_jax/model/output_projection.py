"""The output projection: the vocabulary in up to three blocks, each with separate thresholds.

The error of a token's logit matters in proportion to ``p (1 - p)``, where p is the token's probability, and
most tokens of a vocabulary are rarely probable. In a graded model the tokens are therefore ordered by their
sensitivity and cut into vocabulary blocks. The same activations read more bits of the first block than of the
last.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from grinqh_jax.model.apply import Apply
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.linear import Linear, build_linear
from grinqh_jax.model.logit_transform import IDENTITY, LogitTransform
from grinqh_jax.model.partition import AXIS, Partition
from pallas_kernels import Activations, layout

_BLOCK_END_DIVISORS = (16, 4, 1)
"""A block ends at the vocabulary size divided by each of these, rounded up to a whole tile."""


def block_sizes(vocabulary: int) -> tuple[int, ...]:
    """Returns the number of tokens in each block. Each block but the last is a whole number of tiles."""
    ends = {min(layout.round_up(-(-vocabulary // d), layout.TILE), vocabulary) for d in _BLOCK_END_DIVISORS}
    return tuple(end - start for start, end in itertools.pairwise([0, *sorted(ends)]))


def block_shapes(hidden: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    """Returns ``(in_features, out_features)`` of each block by its name, which is its path in checkpoints."""
    sizes = block_sizes(vocabulary)
    return {name: (hidden, size) for name, size in zip(block_names(len(sizes)), sizes, strict=True)}


def block_names(count: int) -> list[str]:
    """Returns the names of the linear layers of a projection with ``count`` blocks."""
    return [f"{HEAD}.blocks.{i}" for i in range(count)]


class OutputProjection(nnx.Module):
    """Projects hidden states to logits.

    Attributes:
      blocks: Linear layers of the vocabulary blocks. A dense model has one, with its tokens in order.
      transform: Function from the outputs of the blocks to logits.
      token_to_output: int32 ``[vocab]``, index of each token's logit among the outputs of all blocks; None if
        the outputs are in the order of the tokens. Reordering a whole vocabulary takes longer than choosing a
        token, so callers that accept any order use ``outputs`` and ``tokens`` instead.
      vocabulary: Number of tokens.
      partition: How a mesh cuts the model; None for one device. Each device then has an even share of the
        tokens of each block, and gathers the outputs of all devices: one device's after another's.
    """

    def __init__(
        self,
        tree: Mapping[str, Any],
        shape: tuple[int, int],
        compute_dtype,
        transform: LogitTransform = IDENTITY,
        partition: Partition | None = None,
    ):
        self.transform, self.partition = transform, partition
        hidden, self.vocabulary = shape
        sizes = (self.vocabulary,) if "kernel" in tree else block_sizes(self.vocabulary)
        self._sizes = sizes
        if partition is not None:
            sizes = tuple(-(-size // partition.devices) for size in sizes)
        parts = [tree] if "kernel" in tree else [tree["blocks"][str(i)] for i in range(len(sizes))]
        self.blocks = nnx.List(
            [build_linear(part, (hidden, n), compute_dtype) for part, n in zip(parts, sizes, strict=True)]
        )
        self.token_to_output = None if "kernel" in tree else nnx.Param(tree["columns"])

    def __call__(self, x: Activations, apply: Apply) -> Float[Array, "*rows v"]:
        """Returns float32 logits, in the order of the tokens, of hidden states ``[*rows, d]``."""
        return self.in_order(self.outputs(x, apply))

    def outputs(self, x: Activations, apply: Apply) -> Float[Array, "*rows v"]:
        """Returns float32 logits in the order of the blocks' outputs; calls ``apply`` for each block."""
        outputs = [apply(name, block, x) for name, block in zip(self.names, self.blocks, strict=True)]
        arrays = [output.array.astype(jnp.float32) for output in outputs]
        logits = jnp.concatenate(arrays, axis=-1)
        if self.partition is not None:
            logits = jax.lax.all_gather(logits, AXIS, axis=logits.ndim - 1, tiled=True)
            real = _real_outputs(self._sizes, self.partition.devices)
            logits = logits if real is None else logits[..., real]
        return self.transform(logits)

    def in_order(self, outputs: Float[Array, "*rows v"]) -> Float[Array, "*rows v"]:
        """Returns ``outputs`` in the order of the tokens."""
        return outputs if self.token_to_output is None else outputs[..., self.token_to_output[...]]

    def tokens(self) -> Int[Array, "v"]:
        """Returns the int32 token of each of the ``outputs``: the inverse of ``token_to_output``."""
        in_order = jnp.arange(self.vocabulary, dtype=jnp.int32)
        if self.token_to_output is None:
            return in_order
        return jnp.zeros_like(in_order).at[self.token_to_output[...]].set(in_order, unique_indices=True)

    @property
    def names(self) -> list[str]:
        """Names of the blocks."""
        return block_names(len(self.blocks))

    def block(self, name: str) -> Linear:
        """Returns the block with this name, one of ``names``."""
        return self.blocks[int(name.rpartition(".")[2])]


def _real_outputs(sizes: tuple[int, ...], devices: int) -> Int[np.ndarray, "v"] | None:
    """Returns the gathered outputs that are no padding; None if there is no padding.

    Args:
      sizes: Number of tokens of each block.
      devices: Number of devices, each of which has an equal share of each block, padding included.
    """
    widths = [-(-size // devices) for size in sizes]
    real = [
        device * width + np.arange(width) < size
        for device in range(devices)
        for size, width in zip(sizes, widths, strict=True)
    ]
    outputs = np.flatnonzero(np.concatenate(real))
    return None if len(outputs) == devices * sum(widths) else outputs
