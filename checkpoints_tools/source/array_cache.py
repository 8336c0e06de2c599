"""A cache of arrays that are expensive to read, limited to the memory that is free."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

HOST_BYTES = 1 << 30
"""Limit on a CPU, where host and device share their memory and a conversion should need little of it."""

T = TypeVar("T")


class ArrayCache:
    """A cache of pytrees of arrays by name. Pytrees that do not fit are read again each time.

    The cache keeps the first pytrees and not the last ones. In repeated passes over all layers, replacing the
    oldest ones would evict each pytree just before the next pass needs it.

    Args:
      limit: Capacity in bytes; ``free_bytes()`` by default.
    """

    def __init__(self, limit: int | None = None):
        self._free = free_bytes() if limit is None else limit
        self._values: dict[str, Any] = {}

    def __call__(self, name: str, read: Callable[[], T]) -> T:
        """Returns the value called ``name``, from ``read`` if it is not cached."""
        if name in self._values:
            return self._values[name]
        value = read()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
        if size <= self._free:
            self._free -= size
            self._values[name] = value
        return value


def free_bytes() -> int:
    """Returns half of the free memory of the first device in bytes, or ``HOST_BYTES`` on a CPU."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats()
    if device.platform == "cpu" or not statistics:
        return HOST_BYTES
    return (statistics["bytes_limit"] - statistics["bytes_in_use"]) // 2
