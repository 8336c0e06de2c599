"""One server for all tests of this directory, and an engine for those that need it in their process.

The model is a tiny one of bytes that can chat. Server and engine have the same sizes, so they share compiled
programs.
"""

import openai
import pytest
from server_process import serving

SIZES = {"slots": 2, "max_context": 128, "prefill_chunk": 64}
FLAGS = ("--slots=2", "--max-context=128", "--prefill-chunk=64", "--queue=62", "--prompt-logprobs")
LIMITS = ("--receive-seconds", "2", "--max-body", "64K", "--request-seconds", "60")
NAMES = ("--allowed-host", "allowed.example")


@pytest.fixture(scope="session")
def server(chat_directory):
    with serving("--model", str(chat_directory), *FLAGS, *LIMITS, *NAMES) as server:
        yield server
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def library(one_layer_generator):
    """The server's model in this process."""
    return one_layer_generator


@pytest.fixture(scope="session")
def library_engine(library):
    """An engine in this process, with the sizes of the server's engine."""
    from grinqh_jax.serving.engine import Engine

    with Engine(library, **SIZES, prompt_logprobs=True, grammars=True) as engine:
        yield engine
