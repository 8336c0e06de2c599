"""The server as a process: its flags, API keys, other origins, and its end."""

import json
import signal
import socket
import threading

import openai
import pytest
from server_process import complete, post, serving

from grinqh_jax.cli import serve

GOOD = {"prompt": "The cat", "max_tokens": 100, "temperature": 1.0, "ignore_eos": True, "stream": True}


@pytest.mark.slow
def test_keys_origins_and_a_drain(chat_directory, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\n\nsecond\n")
    flags = ("--model", str(chat_directory), "--served-model-name", "name@x", "--api-key-file", str(keys))
    flags += ("--slots", "2", "--max-context", "128", "--prefill-chunk", "64", "--queue", "0", "--access-log")
    with serving(*flags, "--cors-origin", "https://a.example", env={"GRINQH_API_KEY": "third"}) as server:
        for key in ("first", "second", "third"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                assert [model.id for model in client.models.list()] == ["name@x"]
                answer = client.completions.create(model="name@x@2", prompt="a", max_tokens=3)
                assert answer.usage.realised_bits < 4
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="firs", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as error:
                client.models.list()
            assert error.value.code == "invalid_api_key"
        assert server.json("/health")[0] == 200
        assert server.json("/metrics")[0] == 401
        preflight = (
            b"OPTIONS /v1/completions HTTP/1.1\r\nHost: a\r\nOrigin: https://%s\r\n"
            b"Access-Control-Request-Method: POST\r\n\r\n"
        )
        assert server.exchange(preflight % b"a.example")[0] == 200
        assert server.exchange(preflight % b"b.example")[0] == 400
        drain(server)
        assert any('"POST /v1/completions HTTP/1.1" 200' in line for line in server.lines)


def drain(server):
    """Sends SIGTERM during two answers, which end in full; a third found no room before."""
    request = post("/v1/completions", json.dumps(GOOD).encode(), Authorization="Bearer first")
    socks = [server.connect() for _ in range(2)]
    for sock in socks:
        sock.sendall(request)
        sock.recv(1)  # the answer has begun
    status, body = server.exchange(request)
    assert status == 429
    assert json.loads(body)["error"]["code"] == "queue_full"
    codes = []
    stop = threading.Thread(target=lambda: codes.append(server.stop(signal.SIGTERM)))
    stop.start()
    for sock in socks:
        received = b"H"
        while not complete(received) and (part := sock.recv(1 << 16)):
            received += part
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        sock.close()
    stop.join()
    assert codes == [0]
    with pytest.raises(ConnectionRefusedError):
        server.connect()
    assert not [line for line in server.lines if "Traceback" in line or "error" in line.lower()]


@pytest.mark.slow
def test_a_drain_cuts_answers_that_take_longer(chat_directory):
    flags = ("--slots", "2", "--max-context", "128", "--prefill-chunk", "64", "--drain-seconds", "0.05")
    with serving("--model", str(chat_directory), *flags) as server:
        socks = [server.connect() for _ in range(2)]
        for sock, stream in zip(socks, (True, False), strict=True):
            body = GOOD | {"stream": stream, "n": 60}
            sock.sendall(post("/v1/completions", json.dumps(body).encode()))
        socks[0].recv(1)  # the stream has begun
        assert server.stop(signal.SIGTERM) == 0
        streamed, whole = (b"".join(iter(lambda: sock.recv(1 << 16), b"")) for sock in socks)  # noqa: B023
        for received in (streamed, whole):
            assert b"the server is shutting down; try again later" in received
        assert whole.startswith(b"HTTP/1.1 503 ")
        assert streamed.endswith(b"}}\n\n\r\n0\r\n\r\n")
        assert not [line for line in server.lines if "Traceback" in line or "error" in line.lower()]
        for sock in socks:
            sock.close()


WRONG = {
    "--port 99999": "expected 0 to 65535",
    "--host 999.0.0.1": "cannot listen on 999.0.0.1 port 8000",
    "--allowed-host a.example:80": "expected a name without scheme and port",
    "--slots 0": "expected 1 or more",
    "--cache-memory 3X": "is not a size; write 512M or 8G",
    "--request-seconds 0": "expected a positive number of seconds",
    "--api-key-file nowhere": "--api-key-file nowhere: No such file",
    "--port 0 --max-context 1": "a context of 1 tokens",
    "--port 0 --slots 65": "slots 65: 1 to 64 requests",
    "--port 0 --prefill-chunk 100": "a prefill chunk of 100 tokens is not a multiple of the page size 64",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_refused_before_the_server_listens(chat_directory, capsys, flags):
    try:
        code = serve.main(["--model", str(chat_directory), *flags.split()])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert WRONG[flags] in capsys.readouterr().err


def test_a_port_in_use_is_refused(chat_directory, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--model", str(chat_directory), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
