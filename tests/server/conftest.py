"""One server for all tests of this directory: a tiny model of bytes that can chat."""

import openai
import pytest
from server_process import serving

SIZES = (
    "--slots",
    "4",
    "--max-context",
    "128",
    "--prefill-piece",
    "64",
    "--queue",
    "60",
    "--prompt-logprobs",
)
LIMITS = ("--receive-seconds", "2", "--max-body", "64K", "--request-seconds", "60")


@pytest.fixture(scope="session")
def server(chat_directory):
    with serving("--model", str(chat_directory), *SIZES, *LIMITS) as server:
        yield server
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
