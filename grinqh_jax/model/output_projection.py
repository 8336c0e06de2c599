"""The output projection: the vocabulary in a few blocks, each with thresholds of its own.

What an error of a token's logit does to the prediction goes by how likely the token is, and most of a
vocabulary is hardly ever likely. So in a graded model the tokens are ordered by how much predictions depend
on them and cut into blocks, and the same activation is read with more bits for the first block than for the
last.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from grinqh_jax.model.apply import HEAD, Apply
from grinqh_jax.model.linear import Linear, linear_of
from pallas_kernels import Activations, layout

_EDGES = (16, 4, 1)
"""The blocks end at these fractions of the vocabulary."""


def block_sizes(vocabulary: int) -> tuple[int, ...]:
    """Tokens of each block of a vocabulary of so many, whole tiles but for the last: few to begin with."""
    edges = {min(layout.round_up(-(-vocabulary // part), layout.TILE), vocabulary) for part in _EDGES}
    ends = sorted(edges)
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))


def block_shapes(hidden: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    """``(in_features, out_features)`` of the blocks by name, which is also their place in the state tree."""
    sizes = block_sizes(vocabulary)
    return {name: (hidden, size) for name, size in zip(block_names(len(sizes)), sizes, strict=True)}


def block_names(count: int) -> list[str]:
    """What the linear layers of a projection of so many blocks are called."""
    return [f"{HEAD}.blocks.{i}" for i in range(count)]


class OutputProjection(nnx.Module):
    """Hidden states to logits.

    Attributes:
      blocks: linear layers. A dense model has one, with its tokens in order.
      columns: int32 ``[vocab]``: where the logit of each token is among the outputs of all blocks; None
        where they are in order. A gather of a whole vocabulary takes longer than the choice of a token, so
        ``outputs`` and ``tokens`` are there for whoever does not mind the order.
    """

    def __init__(self, tree: Mapping[str, Any], shape: tuple[int, int], compute_dtype):
        if "kernel" in tree:
            self.blocks = nnx.List([linear_of(tree, shape, compute_dtype)])
            self.columns = None
        else:
            shapes = block_shapes(*shape).values()
            self.blocks = nnx.List(
                [linear_of(tree["blocks"][str(i)], shape, compute_dtype) for i, shape in enumerate(shapes)]
            )
            self.columns = nnx.Param(tree["columns"])

    def __call__(self, x: Activations, apply: Apply) -> Float[Array, "*rows v"]:
        """float32 logits; ``apply`` is called for each block."""
        return self.in_order(self.outputs(x, apply))

    def outputs(self, x: Activations, apply: Apply) -> Float[Array, "*rows v"]:
        """The same logits, in the order of the blocks' outputs."""
        outputs = [apply(name, block, x) for name, block in zip(self.names, self.blocks, strict=True)]
        return jnp.concatenate([output.array.astype(jnp.float32) for output in outputs], axis=-1)

    def in_order(self, outputs: Float[Array, "*rows v"]) -> Float[Array, "*rows v"]:
        """``outputs`` in the order of the tokens."""
        return outputs if self.columns is None else outputs[..., self.columns[...]]

    def tokens(self) -> Int[Array, "v"]:
        """int32, the token that each of the ``outputs`` is the logit of."""
        in_order = jnp.arange(sum(block.out_features for block in self.blocks), dtype=jnp.int32)
        if self.columns is None:
            return in_order
        return jnp.zeros_like(in_order).at[self.columns[...]].set(in_order, unique_indices=True)

    @property
    def names(self) -> list[str]:
        """Of the blocks, which ``apply`` is called with."""
        return block_names(len(self.blocks))

    def block(self, name: str) -> Linear:
        """The block of one of ``names``."""
        return self.blocks[int(name.rpartition(".")[2])]
