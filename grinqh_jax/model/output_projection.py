"""The output projection: the vocabulary in up to three blocks, each with separate thresholds.

The error of a token's logit matters in proportion to ``p (1 - p)``, where p is the token's probability, and
most tokens of a vocabulary are rarely probable. In a graded model the tokens are therefore ordered by their
sensitivity and cut into vocabulary blocks. The same activations read more bits of the first block than of the
last.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from grinqh_jax.model.apply import Apply
from grinqh_jax.model.layer_spec import HEAD, IDENTITY, LogitTransform
from grinqh_jax.model.linear import Linear, build_linear
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
    """

    def __init__(
        self,
        tree: Mapping[str, Any],
        shape: tuple[int, int],
        compute_dtype,
        transform: LogitTransform = IDENTITY,
    ):
        self.transform = transform
        if "kernel" in tree:
            self.blocks = nnx.List([build_linear(tree, shape, compute_dtype)])
            self.token_to_output = None
        else:
            shapes = block_shapes(*shape).values()
            self.blocks = nnx.List(
                [build_linear(tree["blocks"][str(i)], shape, compute_dtype) for i, shape in enumerate(shapes)]
            )
            self.token_to_output = nnx.Param(tree["columns"])

    def __call__(self, x: Activations, apply: Apply) -> Float[Array, "*rows v"]:
        """Returns float32 logits, in the order of the tokens, of hidden states ``[*rows, d]``."""
        return self.in_order(self.outputs(x, apply))

    def outputs(self, x: Activations, apply: Apply) -> Float[Array, "*rows v"]:
        """Returns float32 logits in the order of the blocks' outputs; calls ``apply`` for each block."""
        outputs = [apply(name, block, x) for name, block in zip(self.names, self.blocks, strict=True)]
        arrays = [output.array.astype(jnp.float32) for output in outputs]
        return self.transform(jnp.concatenate(arrays, axis=-1))

    def in_order(self, outputs: Float[Array, "*rows v"]) -> Float[Array, "*rows v"]:
        """Returns ``outputs`` in the order of the tokens."""
        return outputs if self.token_to_output is None else outputs[..., self.token_to_output[...]]

    def tokens(self) -> Int[Array, "v"]:
        """Returns the int32 token of each of the ``outputs``: the inverse of ``token_to_output``."""
        in_order = jnp.arange(sum(block.out_features for block in self.blocks), dtype=jnp.int32)
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
