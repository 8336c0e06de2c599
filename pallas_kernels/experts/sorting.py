"""Rows in the order of their experts."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class SortedRows(NamedTuple):
    """Where rows lie when they are sorted by expert; rows of one expert keep their order.

    Attributes:
      order: The sorted rows, indices into the rows.
      counts: Number of rows of each expert.
      starts: Place of each expert's first row among the sorted rows.
      rank: Place of each row among those of its expert; undefined for rows without an expert.
    """

    order: Int[Array, "rows"]
    counts: Int[Array, "e"]
    starts: Int[Array, "e"]
    rank: Int[Array, "rows"]


def sort_by_expert(experts: Int[Array, "rows"], num_experts: int) -> SortedRows:
    """Sorts rows by expert.

    Args:
      experts: Expert of each row; rows without an expert have ``num_experts``, and come last.
      num_experts: Number of experts.
    """
    count = len(experts)
    order = jnp.argsort(experts).astype(jnp.int32)
    counts = jnp.zeros(num_experts, jnp.int32).at[experts].add(1, mode="drop")
    starts = jnp.cumsum(counts) - counts
    place = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
    return SortedRows(order, counts, starts, place - starts.at[experts].get(mode="clip"))
