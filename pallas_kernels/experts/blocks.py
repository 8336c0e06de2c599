"""Runs a function of an expert and some of its rows over rows that are grouped by expert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LEAST_ROWS, MOST_ROWS = 8, 128
"""Limits of the number of rows of a block."""


def block_rows(rows: int, num_experts: int) -> int:
    """Returns the rows of a block: about twice the mean number of rows of an expert, a power of two."""
    wanted = max(2 * rows // num_experts, 1)
    return min(max(1 << (wanted - 1).bit_length(), LEAST_ROWS), MOST_ROWS)


def map_blocks(
    function: Callable[[Int[Array, ""], Any], Float[Array, "block n"]],
    rows: Any,
    experts: Int[Array, "rows"],
    *,
    num_experts: int,
    outputs: int,
    size: int | None = None,
) -> Float[Array, "rows n"]:
    """Applies a function to blocks of rows that share an expert.

    The work is that of the rows, plus at most one partly filled block for each expert that has any. Experts
    without rows cost nothing, so a function that reads the weights of its expert reads no others.
    ``jax.lax.ragged_dot`` (jax 0.10.2 and 0.12) multiplies all rows by all experts on a CPU: with 1,024 rows
    and 128 experts it takes 40 to 60 times as long as this loop on two cores.

    Args:
      function: Function from an expert and a block of ``rows`` to float32 ``[block, outputs]``. Rows that
        fill up a block are zeros, and what it returns for them is dropped.
      rows: Arrays ``[rows, ...]``.
      experts: Expert of each row; rows of expert ``num_experts`` get zeros.
      num_experts: Number of experts.
      outputs: Length of a row of the result.
      size: Rows of a block; those of ``block_rows`` by default.
    """
    count = len(experts)
    size = size or block_rows(count, num_experts)
    order = jnp.argsort(experts)
    counts = jnp.zeros(num_experts, jnp.int32).at[experts].add(1)
    ends, blocks = jnp.cumsum(counts), -(-counts // size)
    block_ends = jnp.cumsum(blocks)

    def run(i, y):
        expert = jnp.sum(block_ends <= i)
        block = i - (block_ends[expert] - blocks[expert])
        place = ends[expert] - counts[expert] + block * size + jnp.arange(size)
        index = jnp.where(place < ends[expert], order[jnp.minimum(place, count - 1)], count)
        members = jax.tree.map(lambda array: array.at[index].get(mode="fill", fill_value=0), rows)
        return y.at[index].set(function(expert, members), mode="drop")

    # Zeros that depend on nothing are made ahead: XLA (jax 0.11.2) has those of all layers in memory at once.
    zeros, _ = jax.lax.optimization_barrier((jnp.zeros((count, outputs), jnp.float32), counts))
    return jax.lax.fori_loop(0, block_ends[-1], run, zeros)
