"""API keys and names of the host."""

import asyncio

import pytest

from grinqh_jax.server.access import Access, is_loopback


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


def test_paths_without_a_key():
    assert status(["key"], None, "/health") == 200
    assert status(["key"], None, "/metrics") == 401
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
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("", 403),
    ],
)
def test_without_a_key_a_host_must_be_this_machine_or_allowed(host, expected):
    assert status([], ["allowed.example"], host=host) == expected
    assert status([], None, host=host) == 200


def test_loopback():
    assert [is_loopback(name) for name in ("::1", "127.0.0.1", "0.0.0.0", "::", "192.168.0.1")] == [
        True,
        True,
        False,
        False,
        False,
    ]
