"""What has been read once and stays in memory while there is room for it."""

from collections.abc import Callable
from typing import TypeVar

import jax

HOST_BYTES = 1 << 30
"""Limit on a CPU, where host and device share their memory: a conversion should need little of it."""

T = TypeVar("T")


class ArrayCache:
    """Pytrees of arrays by name; each is read again and again once they fill the room that there is.

    The first ones are kept, not the last: in a pass over all layers the last ones would always be those that
    the next pass wants last.

    Args:
      limit: bytes; ``room()`` by default.
    """

    def __init__(self, limit: int | None = None):
        self._room = room() if limit is None else limit
        self._values: dict[str, object] = {}

    def __call__(self, name: str, read: Callable[[], T]) -> T:
        """The value of that name, from ``read`` if it is not kept."""
        if name in self._values:
            return self._values[name]
        value = read()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
        if size <= self._room:
            self._room -= size
            self._values[name] = value
        return value


def room() -> int:
    """Bytes: half of what the first device has free, or ``HOST_BYTES`` on a CPU."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats()
    if device.platform == "cpu" or not statistics:
        return HOST_BYTES
    return (statistics["bytes_limit"] - statistics["bytes_in_use"]) // 2
