"""Several processes serve one model: process 0 decides, and the others repeat its calls of the device.

Every process must start the same programs in the same order, because they exchange data. Process 0 has the
requests, the scheduler and the results. It sends each call of a ``Device`` to the others before it makes the
call itself. Prefixes stay on the devices, and calls name them by number.
"""

import contextlib
import secrets
import socket
import weakref
from collections import deque
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.prefix import Prefix
from grinqh_jax.errors import GrinqhError

_KEY_BYTES = 32
_MESSAGE_BYTES = 512
"""Size of the message with the address and the key of process 0."""


class _Number(int):
    """A prefix in a call that is sent."""


class Leader:
    """The connections of process 0 to all others."""

    def __init__(self, connections: list[Connection]):
        self._connections = connections
        self._numbers: dict[int, int] = {}  # of the prefixes that exist, by id
        self._dropped: deque[int] = deque()
        self._count = 0

    def lead(self, device: Device) -> None:
        """Sends the calls of a device from now on."""
        device.on_call, device.on_prefix = self._send, self._number

    def close(self) -> None:
        """Lets the other processes end."""
        for connection in self._connections:
            with contextlib.suppress(OSError):  # It has ended already.
                connection.send(None)
            connection.close()
        self._connections = []

    def _send(self, name: str, arguments: tuple[Any, ...]) -> None:
        sent = tuple(
            _Number(self._numbers[id(each)]) if isinstance(each, Prefix) else each for each in arguments
        )
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        for connection in self._connections:
            connection.send((dropped, name, sent))

    def _number(self, prefix: Prefix) -> None:
        """Numbers a prefix that a call has returned, as the other processes do."""
        key, number = id(prefix), self._count
        self._numbers[key], self._count = number, self._count + 1
        weakref.finalize(prefix, self._drop, key, number)

    def _drop(self, key: int, number: int) -> None:
        del self._numbers[key]
        self._dropped.append(number)


class Follower:
    """The connection of another process to process 0."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def follow(self, device: Device) -> None:
        """Repeats the calls of process 0 until it closes.

        Raises:
          GrinqhError: Process 0 has ended before.
        """
        prefixes: dict[int, Prefix] = {}
        count = 0
        while (message := self._received()) is not None:
            dropped, name, sent = message
            for number in dropped:
                del prefixes[number]
            result = getattr(device, name)(
                *(prefixes[each] if isinstance(each, _Number) else each for each in sent)
            )
            if isinstance(result, Prefix):
                prefixes[count] = result
                count += 1

    def _received(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise GrinqhError("process 0 has ended, or its host") from None


def meet(coordinator: str) -> Leader | Follower | None:
    """Connects all processes; returns the role of this one, or None if it is the only one.

    Args:
      coordinator: ``HOST:PORT`` of process 0 (``sharding.processes.join``), or ``auto``.
    """
    others = jax.process_count() - 1
    if others == 0:
        return None
    host, colon, _ = coordinator.rpartition(":")
    host = host.strip("[]") if colon else socket.gethostname()
    if jax.process_index() > 0:
        host, port, key = _message(None)
        return Follower(Client((host, int(port)), authkey=key.encode()))
    key = secrets.token_hex(_KEY_BYTES)
    with Listener((host, 0), backlog=others, authkey=key.encode()) as waiting:
        _message((host, str(waiting.address[1]), key))
        return Leader([waiting.accept() for _ in range(others)])


def agreed(number: int) -> int:
    """Returns the number of process 0; all processes call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _message(texts: tuple[str, ...] | None) -> list[str]:
    """Returns the texts of process 0; the others give None."""
    encoded = np.zeros(_MESSAGE_BYTES, np.uint8)
    if texts is not None:
        data = "\n".join(texts).encode()
        encoded[: len(data)] = np.frombuffer(data, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(encoded))
    return received.astype(np.uint8).tobytes().rstrip(b"\0").decode().split("\n")
