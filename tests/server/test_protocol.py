"""Time limits of connections, with an application that sends more than the kernel keeps."""

import socket
import threading
import time

import pytest
import uvicorn

from grinqh_jax.server import run
from grinqh_jax.server.protocol import protocol

RECEIVE_SECONDS = 0.5
SIZE = 24 << 20


async def large(scope, receive, send):
    """One part, or many for the path ``/parts``."""
    parts = 64 if scope["path"] == "/parts" else 1
    headers = [(b"content-length", str(SIZE).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for i in range(parts):
        await send({"type": "http.response.body", "body": bytes(SIZE // parts), "more_body": i < parts - 1})


@pytest.fixture(scope="module")
def server():
    with run.bind("127.0.0.1", 0) as bound:
        config = uvicorn.Config(large, http=protocol(RECEIVE_SECONDS), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server, bound.getsockname()
        server.should_exit = True
        thread.join()


def ask(address: tuple[str, int], path: str) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    sock.settimeout(30)
    sock.connect(address)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return sock


@pytest.mark.parametrize("path", ["/", "/parts"])
def test_a_client_that_stops_reading_loses_its_connection(server, path):
    server, address = server
    with ask(address, path) as sock:
        sock.recv(1)
        assert server.server_state.connections
        deadline = time.monotonic() + 20 * RECEIVE_SECONDS
        while server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not server.server_state.connections


@pytest.mark.parametrize("path", ["/", "/parts"])
def test_a_client_that_reads_slowly_gets_all_of_a_response(server, path):
    with ask(server[1], path) as sock:
        started, received = time.monotonic(), 0
        while received < SIZE:
            part = sock.recv(1 << 19)
            assert part, f"the connection ended after {received} bytes"
            received += len(part)
            time.sleep(0.1 * RECEIVE_SECONDS * len(part) / (1 << 20))
        assert time.monotonic() - started > 2 * RECEIVE_SECONDS
