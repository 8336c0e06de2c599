"""Listens, serves and drains."""

import asyncio
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable, Collection, Sequence

import prometheus_client
import uvicorn

from grinqh_jax.errors import UsageError
from grinqh_jax.server.app import application
from grinqh_jax.server.limits import ConnectionLimit, Limits
from grinqh_jax.server.protocol import protocol
from grinqh_jax.server.service import Service

CUT_SECONDS = 2
"""Time in which requests that a drain has cut send their error, before uvicorn cancels them."""

SWITCH_SECONDS = 0.0005
"""Longest time that a thread keeps Python's lock while another one waits for it.

The engine's thread gives up the lock whenever it dispatches a program. A thread that is busy with requests
would then keep it for Python's 5 ms, while the device waits for the next program.
"""


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound and does not listen yet, so that a wrong address is known early.

    Args:
      host: Name or address.
      port: Port; 0 for a free one.

    Raises:
      UsageError: The address cannot be bound.
    """
    bound = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --host or --port"
        ) from None
    return bound


def url(bound: socket.socket) -> str:
    """Returns the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def serve(
    service: Service,
    bound: socket.socket,
    *,
    keys: Sequence[str] = (),
    hosts: Collection[str] | None = None,
    origins: Sequence[str] = (),
    access_log: bool = False,
    on_listening: Callable[[], None] = lambda: None,
) -> bool:
    """Serves until SIGTERM or SIGINT, then lets running requests end.

    Args:
      service: Model and engine.
      bound: Socket of ``bind``.
      keys: API keys; none are needed if it is empty.
      hosts: Accepted names in the header ``Host`` (see ``access.Access``).
      origins: Origins whose web pages may use the server (CORS).
      access_log: Whether to log every request on stderr.
      on_listening: Callback when clients can connect.

    Returns:
      Whether the engine was alive to the end.
    """
    limits: Limits = service.limits
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if access_log else logging.WARNING)
    prometheus_client.disable_created_metrics()  # a second series for each, with the time of its creation
    app = application(service, keys=keys, hosts=hosts, origins=origins)
    config = uvicorn.Config(
        ConnectionLimit(app, limits.connections, lambda: len(server.server_state.connections)),
        loop="asyncio",
        http=protocol(limits.receive_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(limits.drain_seconds) + CUT_SECONDS,
        h11_max_incomplete_event_size=limits.header_bytes,
    )
    server = _Server(config, service, on_listening)
    # uvicorn drains on these signals and then raises them again for the handlers of before, which end the
    # process with a signal. A drained server has ended well.
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGINT)}
    switch_seconds = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        server.run(sockets=[bound])
    finally:
        sys.setswitchinterval(switch_seconds)
        for each, handler in before.items():
            signal.signal(each, handler)
    return service.engine.error is None


class _Server(uvicorn.Server):
    """A server that ends if its engine has ended, so that a supervisor starts another."""

    def __init__(self, config: uvicorn.Config, service: Service, on_listening: Callable[[], None]):
        super().__init__(config)
        self._service = service
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = self._service.limits.drain_seconds
        end = asyncio.get_running_loop().call_later(drain, self._service.cut)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.engine.error is not None
