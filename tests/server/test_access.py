"""API keys and names of the host."""

import asyncio
import socket

import openai
import pytest

from grinqh_jax.server.access import Access, own_names


def status(keys, hosts, path="/v1/models", **headers) -> int:
    """Status of a request, 200 if it passes."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "headers": fields, "method": "GET"}
    asyncio.run(Access(app, keys, hosts)(scope, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        ("Bearer first", 200),
        ("bearer  second ", 200),
        ("Bearer firs", 401),
        ("Bearer first second", 401),
        ("Bearer ", 401),
        ("Basic first", 401),
        ("first", 401),
        ("Bearer f\u00efrst", 401),
    ],
)
def test_a_key_must_be_one_of_the_keys(authorization, expected):
    assert status(["first", "second"], None, host="any.example", authorization=authorization) == expected


def test_a_server_without_keys_answers_to_its_own_names_only(server):
    """By OpenAI's client on a socket. A page that rebinds its name cannot choose another header."""

    def models(host: str) -> list[str]:
        with openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, default_headers={"Host": host}
        ) as client:
            return [model.id for model in client.models.list()]

    for host in ("localhost", "192.168.1.5:8000", f"{socket.gethostname()}:80", "Allowed.Example"):
        assert models(host)
    for host in ("evil.example", f"localhost.evil.example:{server.port}"):
        with pytest.raises(
            openai.PermissionDeniedError, match=f"'{host}' is no name of this .*--allowed-host"
        ) as error:
            models(host)
        assert error.value.code == "host"
    assert server.exchange(b"GET /health HTTP/1.0\r\n\r\n")[0] == 403


def test_paths_without_a_key():
    assert status(["key"], None, "/health") == 200
    assert status(["key"], None, "/metrics") == 401
    assert status(["key"], None, "/v1/answers/cmpl-0/bits") == 401
    assert status([], None) == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("127.9.9.9:80", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST.", 200),
        ("app.localhost", 200),
        ("allowed.example:443", 200),
        ("10.0.0.1", 200),
        ("[2001:db8::1]:8000", 200),
        ("machine:8000", 200),
        ("machine.local", 200),
        ("Machine.Office.example.", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("machine.evil.example", 403),
        ("", 403),
    ],
)
def test_without_a_key_a_host_must_be_this_machine_or_allowed(monkeypatch, host, expected):
    monkeypatch.setattr(socket, "gethostname", lambda: "machine")
    monkeypatch.setattr(socket, "getfqdn", lambda: "machine.office.example")
    for listens_on in ("127.0.0.1", "0.0.0.0", "::"):
        assert status([], own_names(listens_on, ["allowed.example"]), host=host) == expected
    assert status([], own_names("0.0.0.0", ["*"]), host=host) == 200


def test_the_name_that_a_server_listens_on_is_its_own():
    assert status([], own_names("gpu.Example", []), host="gpu.example:8000") == 200
    assert status([], own_names("0.0.0.0", []), host="gpu.example:8000") == 403
