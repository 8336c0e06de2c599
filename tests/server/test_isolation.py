"""No request makes the server open a file, connect to an address or start a program."""

import json
import socket
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from app_exchange import exchange

from grinqh_jax.server.app import application
from grinqh_jax.server.limits import Limits
from grinqh_jax.server.service import Service

WATCHED = {
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "urllib.Request",
    "exec",
}
OWN = "open ('/proc/self/status', "
"""Statistics have the peak of the process's memory, which Linux writes there."""

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Watch:
    """Notes what the process does while it is on. An audit hook cannot be removed, so it is added once."""

    def __init__(self):
        self.events: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.events is not None and event in WATCHED:
            self.events.append(f"{event} {arguments!r:.200}")


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def app(library, library_engine):
    return application(Service("tiny", library, library_engine, Limits()))


@pytest.fixture(scope="module")
def visitors():
    """A local address, and the connections that it got."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[object] = []

        def accept() -> None:
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return
                connection.close()
                accepted.append(address)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], accepted


@pytest.fixture
def secret():
    """A file whose name is short, so that it fits the context."""
    with tempfile.TemporaryDirectory(prefix="s") as directory:
        yield Path(directory) / "a"


def chat(**fields) -> tuple[str, dict]:
    message = {"role": "user", "content": "The cat"}
    return CHAT, {"messages": [message], "max_tokens": 4, "temperature": 0} | fields


def schema(**fields) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"} | fields}}


def tool(**fields) -> dict:
    return {"type": "function", "function": {"name": "f"} | fields}


ORDINARY = [
    (TEXT, {"prompt": "The cat", "max_tokens": 4, "logprobs": 1, "stream": True}),
    (TEXT, {"prompt": ["a", "b"], "max_tokens": 4, "echo": True, "stop": ["x"], "n": 2, "top_p": 0.5}),
    chat(),
    chat(response_format=schema()),
    chat(response_format=schema(type="objekt")),
    chat(tools=[tool(parameters={"type": "object"}, strict=True)]),
    chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    ("/v1/tokenize", {"prompt": "a"}),
    ("/v1/detokenize", {"tokens": [1]}),
    ("/v1/models", None),
    ("/metrics", None),
    ("/", None),
    ("/no/such/path", None),
]
"""One request of each kind. The first of a kind may import modules."""


def hostile(url: str, file: str) -> list[tuple[tuple[str, dict | None], int]]:
    """Requests with addresses and paths of files wherever a text is allowed, and the status of each.

    The context has 128 bytes, so texts are short.
    """
    references = [f"{url}/x.json", f"file://{file}", file, f"{file}#/a", "//127.0.0.1/x", "schema.json"]
    spy = f"{{% include '{file}' %}}{{{{ ''.__class__.mro() }}}}"
    parts = [
        {"type": "image_url", "image_url": {"url": f"{url}/x.png"}},
        {"type": "image_url", "image_url": {"url": f"file://{file}"}},
        {"type": "input_audio", "input_audio": {"data": file, "format": "wav"}},
        {"type": "file", "file": {"file_id": file}},
    ]
    requests: list[tuple[tuple[str, dict | None], int]] = [
        *((chat(response_format=schema(**{"$ref": each})), 400) for each in references),
        *((chat(tools=[tool(parameters={"$ref": each}, strict=True)]), 400) for each in references),
        *((chat(messages=[{"role": "user", "content": [part]}]), 400) for part in parts),
        *((chat(**{name: spy}), 400) for name in ("chat_template", "tokenizer", "lora", "documents")),
        (chat(chat_template_kwargs={"chat_template": spy}), 400),
        (chat(messages=[{"role": "user", "content": spy, "name": "/etc/passwd"}]), 200),
        (chat(tools=[tool(description=spy)], max_tokens=1), 200),
        (chat(model=file), 404),
        (chat(model=f"{url}/model"), 404),
        ((TEXT, {"prompt": f"file://{file}", "max_tokens": 2, "stop": [file], "user": url}), 200),
        ((TEXT, {"prompt": spy, "max_tokens": 2, "model": f"../..{file}"}), 404),
        (("/v1/tokenize", {"prompt": spy}), 200),
    ]
    # Paths of requests name no files.
    for path in (file, f"/..{file}", f"//127.0.0.1{file}", "/static/../index.html", "/page.html"):
        requests += [((path, None), 404), ((path, {"prompt": "a"}), 404)]
    requests += [((f"/v1/models/{each}", None), 404) for each in (file, f"..{file}", url)]
    return requests


def test_no_request_leads_to_a_file_or_to_the_network(app, watch, visitors, secret):
    port, accepted = visitors
    secret.write_text(json.dumps({"enum": ["SECRET"], "a": {"enum": ["SECRET"]}}))
    exchange(app, *ORDINARY)
    requests = hostile(f"http://127.0.0.1:{port}", str(secret))
    watch.events = []
    try:
        responses = [exchange(app, each)[0] for each, _ in requests]
        events = [event for event in watch.events if not event.startswith(OWN)]
        count = len(watch.events)
        secret.read_text()
        assert len(watch.events) == count + 1, "the watch sees files"
    finally:
        watch.events = None
    for (each, status), response in zip(requests, responses, strict=True):
        assert response.status == status, (each, response.text[:300])
        assert "SECRET" not in response.text
    assert not events, "\n".join(events)
    assert accepted == []
