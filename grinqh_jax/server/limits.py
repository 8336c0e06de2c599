"""Limits of the server, and the admission of answers."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from starlette.types import ASGIApp, Receive, Scope, Send

from grinqh_jax.server.errors import APIError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, or all of them together, can take.

    Attributes:
      body_bytes: Largest body of a request.
      header_bytes: Largest header of a request.
      receive_seconds: Most seconds that a client may take to send a header, and again to send a body. Also
        the most seconds in which it takes nothing of a response.
      request_seconds: Most seconds from a request to the end of its answers.
      max_tokens: Most tokens of an answer; None for the rest of the context.
      queue: Number of answers that may wait for a slot.
      connections: Number of open connections.
      drain_seconds: Most seconds that running requests have after SIGTERM.
    """

    body_bytes: int = 4 << 20
    header_bytes: int = 64 << 10
    receive_seconds: float = 20.0
    request_seconds: float = 600.0
    max_tokens: int | None = None
    queue: int = 256
    connections: int = 1024
    drain_seconds: float = 60.0


class ConnectionLimit:
    """Refuses requests while there are too many connections, in OpenAI's shape."""

    def __init__(self, app: ASGIApp, limit: int, connections: Callable[[], int]):
        """Wraps an application.

        Args:
          app: Application.
          limit: Most open connections.
          connections: Function that returns the number of open connections.
        """
        self._app = app
        self._limit = limit
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._connections() > self._limit:
            refusal = APIError(
                503,
                f"there are more than {self._limit} connections; try again later",
                code="too_many_connections",
                headers={"Retry-After": "1", "Connection": "close"},
            )
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class Admission:
    """Counts unfinished answers. Only the event loop's thread uses it.

    Attributes:
      capacity: Most unfinished answers.
      held: Number of unfinished answers.
    """

    def __init__(self, slots: int, queue: int):
        self.capacity = slots + queue
        self.held = 0

    @contextlib.contextmanager
    def hold(self, answers: int) -> Iterator[None]:
        """Admits answers while the block runs.

        Raises:
          APIError: 400 if the server never holds that many; 429 if it does not now.
        """
        if answers > self.capacity:
            raise APIError(
                400,
                f"the request asks for {answers} answers and the server holds {self.capacity}; ask for fewer",
                code="too_many_answers",
            )
        if self.held + answers > self.capacity:
            raise APIError(
                429,
                f"{self.held} answers run or wait and the server holds {self.capacity}; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.held += answers
        try:
            yield
        finally:
            self.held -= answers
