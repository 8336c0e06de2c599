"""Work for a client as long as it stays connected, and server-sent events."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from grinqh_jax.server.errors import ClientDisconnected, as_api_error, log

Result = TypeVar("Result")
Emit = Callable[[dict[str, Any]], Awaitable[None]]

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of ``work``, which is cancelled if the client leaves.

    Args:
      receive: Source of the request's messages, of which the body has been read.
      work: What to do.

    Raises:
      ClientDisconnected: The client has left.
      Exception: ``work`` raises it.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events.

    An error before the first event becomes an ordinary response, and a later one an event.
    """

    def __init__(self, produce: Callable[[Emit], Coroutine[Any, Any, None]]):
        """Makes a response that has not started.

        Args:
          produce: Sends all events through its argument, each a JSON object.
        """
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, lock = False, asyncio.Lock()

        async def write(data: str, last: bool = False) -> None:
            nonlocal started
            body = f"data: {data}\n\n".encode()
            async with lock:  # Several answers may send events.
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    started = True
                await send({"type": "http.response.body", "body": body, "more_body": not last})

        async def emit(event: dict[str, Any]) -> None:
            await write(json.dumps(event, ensure_ascii=False, separators=(",", ":")))

        try:
            await while_connected(receive, self._produce(emit))
        except ClientDisconnected:
            return
        except Exception as error:
            if not started:
                raise
            await write(json.dumps(as_api_error(error).body()), last=True)
            if as_api_error(error).status == 500:
                log(error)
            return
        await write("[DONE]", last=True)
