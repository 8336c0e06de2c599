"""Requests to a server's application in this process, without a socket."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Coroutine
from typing import Any


@dataclasses.dataclass
class Response:
    """What an application has sent."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self):
        return json.loads(self.text)


async def request(app, path: str, body: dict | None) -> Response:
    """Sends one request to an application: a POST with a JSON object, or a GET without."""
    parts = [{"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}]
    sent = []

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "GET" if body is None else "POST", "path": path, "headers": headers}
    await app(scope | {"raw_path": b"", "query_string": b"", "root_path": ""}, receive, send)
    start, *rest = sent
    received = {name.decode().title(): value.decode() for name, value in start["headers"]}
    return Response(start["status"], received, b"".join(each["body"] for each in rest).decode())


def exchange(
    app,
    *requests: tuple[str, dict | None],
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> list[Response]:
    """Sends requests, each a path and a body, to an application at once; returns the responses.

    ``beside`` runs at the same time."""

    async def run():
        other = None if beside is None else asyncio.create_task(beside())
        responses = await asyncio.gather(*(request(app, *each) for each in requests))
        if other is not None:
            await other
        return responses

    return asyncio.run(run())
