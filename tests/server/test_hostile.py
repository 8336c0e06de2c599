"""Malformed and hostile requests, as bytes on a socket: the right status for each, and the server lives."""

import contextlib
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_process import complete, post

GOOD = {"prompt": "The cat", "max_tokens": 4, "temperature": 0}
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/tokenize", "/v1/detokenize")


def bodies() -> list[tuple[bytes, int]]:
    """Bodies and the status that each gets on any of ``PATHS``."""
    good = json.dumps(GOOD).encode()
    invalid = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b"\xff\xfe" + good,
        b"\xef\xbb\xbf" + good,
        b"[" * 50_000,
        b'{"a":' * 10_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\xc3"}',
        b'{"prompt": "a", "bits": NaN}',
        b'{"prompt": "a", "bits": Infinity}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "bits": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "max_tokens": 99999999999999999999999}',
        b'{"prompt": "a"} trailing',
        b"{'prompt': 'a'}",
        b'{"prompt": "a",}',
        b'{"prompt": "a", "prompt\\u0000": 1}',
        b'{"__proto__": {}, "prompt": "a"}',
        b"\x00" * 1000,
        good[:-5],
    ]
    paths = [b'{"prompt": "a", "model": "%s"}' % name for name in (b"../../etc/passwd", b"", b"x@3")]
    return (
        [(body, 400) for body in invalid]
        + [(body, 404) for body in paths]
        + [(b'{"prompt": "' + b"a" * 70_000 + b'"}', 413)]
    )


def wrong_values(count: int) -> list[bytes]:
    """Completions with one field of a wrong type or value."""
    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        1e300,
        2**70,
        "x",
        "\u0000",
        [],
        [[]],
        {},
        {"a": {}},
        [None],
        ["x"] * 99,
        -0.5,
    ]
    fields = ["prompt", "bits", "n", "stream", "stop", "seed", "max_tokens", "temperature", "top_p", "top_k"]
    fields += [
        "min_p",
        "logit_bias",
        "logprobs",
        "echo",
        "stream_options",
        "presence_penalty",
        "model",
        "zzz",
    ]
    return [
        json.dumps(GOOD | {rng.choice(fields): rng.choice(values), "suffix": rng.choice(["", "s"])}).encode()
        for _ in range(count)
    ]


@pytest.fixture(autouse=True)
def alive(server):
    """After each test the server answers, holds no page, and has as many open files as before."""
    answer = server.json("/v1/completions", GOOD)
    files = server.open_files()
    yield
    assert server.process.poll() is None
    status, again = server.json("/v1/completions", GOOD)
    assert (status, again["choices"]) == (200, answer[1]["choices"])
    deadline = time.monotonic() + 10
    while server.metric("grinqh_cache_pages_in_use") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("grinqh_cache_pages_in_use") == 0
    while server.open_files() > files and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.open_files() <= files
    assert not [line for line in server.lines if "Traceback" in line]


def test_malformed_bodies(server):
    for path in PATHS:
        for body, expected in bodies():
            status, response = server.post(path, body)
            if expected == 404 and path not in ("/v1/completions", "/v1/tokenize"):
                expected = 400  # A field that the path does not have is refused before the model is.
            assert status == expected, (path, body[:80], response[:200])
            error = json.loads(response)["error"]
            assert error["message"]
            assert "\n" not in error["message"]
            assert len(error["message"]) < 1000


def test_fields_of_wrong_types_and_values(server):
    statuses = []
    for body in wrong_values(60):
        status, response = server.post("/v1/completions", body)
        assert status in (200, 400, 404), (body, response[:300])
        assert status == 200 or json.loads(response)["error"]["type"] == "invalid_request_error"
        statuses.append(status)
    assert statuses.count(400) > 30


HEADERS = [
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n", 431),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 180_000 + b"\r\n", 431),
    (b"GET /" + b"a" * (1 << 18) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),  # TLS
    (b"GET /health HTTP/9.9\r\n\r\n", 403),
    (b"GET /health\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no host
    (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),  # a name that points to loopback
    (b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n", 400),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /a%0ab" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"A" * 9000 + b" /v1/answers/%0a/bits HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", 200),
    (post("/v1/completions", b"{}", Content_Length="-1"), 400),
    (post("/v1/completions", b"{}", Content_Length="9" * 30), 400),
    (post("/v1/completions", b"{}", Content_Length="1000000000"), 413),
    (post("/v1/completions", b"{}", Content_Type="text/plain"), 415),
    (post("/v1/completions", b"{}", Content_Type="multipart/form-data; boundary=x"), 415),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        400,
    ),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n",
        408,
    ),
    (post("/v1/completions", b"{}", Content_Length="100"), 408),  # fewer bytes than announced
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n", 408),  # an unfinished header
]


def test_malformed_headers(server):
    with ThreadPoolExecutor(len(HEADERS)) as pool:  # Some get their status after a time limit.
        answers = pool.map(server.exchange, [data for data, _ in HEADERS])
    for (data, expected), (status, body) in zip(HEADERS, answers, strict=True):
        assert status == expected, (data[:100], status, body[:200])
        if status >= 400:
            error, _ = json.JSONDecoder().raw_decode(body.decode())  # the first response, if there are two
            assert "\n" not in error["error"]["message"]
            assert len(error["error"]["message"]) < 1000


def test_slow_senders_get_a_status_and_block_nobody(server):
    slow = [server.connect() for _ in range(40)]
    for i, sock in enumerate(slow):
        sock.sendall(post("/v1/completions", b"{}", Content_Length="1000") if i % 2 else b"POST /v1/comp")
    started = time.monotonic()
    assert server.json("/v1/completions", GOOD)[0] == 200
    assert time.monotonic() - started < 2
    for sock in slow:  # one byte now and then does not renew the limit
        with contextlib.suppress(OSError):
            sock.sendall(b" ")
    for sock in slow:
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while not complete(received) and (part := sock.recv(1 << 16)):
                received += part
        assert received.startswith(b"HTTP/1.1 408 "), received[:200]
        sock.close()
    assert time.monotonic() - started < 8


def test_disconnects_at_every_stage(server):
    fields = GOOD | {"max_tokens": 60, "temperature": 1.0, "stream": True, "n": 2, "ignore_eos": True}
    request = post("/v1/completions", json.dumps(fields).encode())
    for cut in (0, 1, 10, 60, 100, len(request) - 3, len(request)):
        for read in (0, 1, 300) if cut == len(request) else (0,):
            for reset in (False, True):
                with server.connect() as sock:
                    if reset:  # the kernel sends RST and not FIN
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    sock.sendall(request[:cut])
                    if read:
                        sock.recv(read)
    assert server.json("/health")[0] == 200


def test_garbage_behind_a_request_ends_only_its_connection(server):
    request = post("/v1/completions", json.dumps(GOOD | {"max_tokens": 60, "ignore_eos": True}).encode())
    status, _ = server.exchange(request + request)  # pipelined
    assert status == 200
    status, _ = server.exchange(request + b"\x00garbage\r\n\r\n")
    assert status in (0, 200, 400)
