"""A server as a process, and requests to it as bytes on a socket."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 240


class ServerProcess:
    """``python -m grinqh_jax serve`` in a process.

    Attributes:
      port: Port on the loopback address.
      process: The process.
      lines: Lines on its stderr so far.
    """

    def __init__(self, *arguments: str, env: dict[str, str] | None = None):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "grinqh_jax", "serve", "--port", "0", *arguments],
            cwd=Path(__file__).parents[2],
            env=os.environ | (env or {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        listening = threading.Event()

        def read() -> None:
            for line in self.process.stderr:
                self.lines.append(line.rstrip())
                if "listens on" in line:
                    listening.set()
            listening.set()

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        if not listening.wait(START_SECONDS) or self.process.poll() is not None:
            self.close()
            raise AssertionError("the server did not start:\n" + "\n".join(self.lines))
        line = next(line for line in self.lines if "listens on" in line)
        self.port = int(re.search(r":(\d+)$", line)[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 30) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def exchange(self, data: bytes, timeout: float = 30) -> tuple[int, bytes]:
        """Sends bytes; returns status and body of the response, 0 if there is none before the end."""
        with self.connect(timeout) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(1 << 16):
                    received += part
                    if complete(received):
                        break
        head, _, body = received.partition(b"\r\n\r\n")
        return int(head.split()[1]) if head else 0, body

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        return self.exchange(post(path, body, **headers))

    def json(self, path: str, fields: object | None = None) -> tuple[int, dict]:
        if fields is None:
            status, body = self.exchange(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        else:
            status, body = self.post(path, json.dumps(fields).encode())
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        """The value of a metric, the sum over its labels."""
        _, body = self.exchange(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", body.decode(), re.M)
        return sum(map(float, values))

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def close(self) -> None:
        """Ends the process in any case."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()


def post(path: str, body: bytes, **headers: str) -> bytes:
    """Returns a POST request."""
    fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def complete(received: bytes) -> bool:
    """Whether a response has arrived: its header and as many bytes as it announces."""
    head, separator, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.I)
    if not separator:
        return False
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


@contextlib.contextmanager
def serving(*arguments: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Runs a server while the block runs."""
    server = ServerProcess(*arguments, env=env)
    try:
        yield server
    finally:
        server.close()
