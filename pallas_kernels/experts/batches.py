"""Runs a function of all experts at once over batches with equally many rows of each expert."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.experts.sorting import sort_by_expert
from pallas_kernels.layout import round_up

FREE_ROWS = 128
"""Rows of an expert whose product takes a GPU about as long as reading the expert's bfloat16 weights: an H200
multiplies at most about 150 times as many numbers as it reads."""

MOST_MEANS, LEAST_MEANS = 16, 2
"""How many times the mean number of rows of an expert a batch has, up to ``FREE_ROWS`` and beyond."""


def batch_rows(rows: int, num_experts: int) -> int:
    """Returns the rows of each expert in a batch: nearly always enough for all rows up to ``FREE_ROWS``."""
    mean = -(-rows // num_experts)
    return round_up(max(min(MOST_MEANS * mean, FREE_ROWS), LEAST_MEANS * mean), 8)


def map_batches(
    function: Callable[[Float[Array, "e capacity k"]], Float[Array, "e capacity n"]],
    rows: Float[Array, "rows k"],
    experts: Int[Array, "rows"],
    *,
    num_experts: int,
    capacity: int,
) -> Float[Array, "rows n"]:
    """Applies a function to batches of ``capacity`` rows of every expert, until all rows are done.

    It serves GPUs that do not run the launch of ``grouped``. The work of that launch does not grow where rows
    choose their experts unevenly.

    A batch is a few launches on a GPU, where ``blocks.map_blocks`` needs several for each expert and waits
    after each. In return, a batch computes also the rows that experts lack. The number of batches is that of
    the expert with most rows, so one usually is enough.

    Args:
      function: Function from a batch of ``rows`` to float32; computes each row by itself. What it returns for
        rows that fill up a batch is dropped.
      rows: Rows of all experts.
      experts: Expert of each row; rows of expert ``num_experts`` get zeros.
      num_experts: Number of experts.
      capacity: Rows of each expert in a batch, as by ``batch_rows``.
    """
    count = len(experts)
    order, counts, starts, rank = sort_by_expert(experts, num_experts)
    batch_of = jnp.where(experts < num_experts, rank // capacity, -1)
    result = jnp.minimum(experts, num_experts - 1) * capacity + rank % capacity

    def run(batch: Int[Array, ""] | int) -> Float[Array, "rows n"]:
        members = starts[:, None] + batch * capacity + jnp.arange(capacity)
        results = function(rows[order[jnp.minimum(members, count - 1)]])
        return results.reshape(-1, results.shape[-1])[result]

    # The first batch is not in the loop. If the loop began with zeros, XLA (jax 0.11.2) would make those of
    # all layers ahead: 11 GB for 2,048 tokens of Qwen3-30B-A3B.
    y = jnp.where((batch_of == 0)[:, None], run(0), 0)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        batch, y = state
        return batch + 1, jnp.where((batch_of == batch)[:, None], run(batch), y)

    batches = -(-jnp.max(counts) // capacity)
    return jax.lax.while_loop(lambda state: state[0] < batches, step, (jnp.int32(1), y))[1]
