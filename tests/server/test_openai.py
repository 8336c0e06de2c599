"""The server as OpenAI's official client sees it, over a socket, with the library as the oracle."""

import json
import time

import jax
import numpy as np
import openai
import pytest
from forward_passes import forward

from grinqh_jax.decoding.request import Request

MODEL = "tiny"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12}


def expected(library, prompt, **settings):
    """Text, tokens and figures of a request that the library answers."""
    generation = library.generate(prompt, Request(**settings), max_context=128)
    return "".join(generation), generation.tokens, generation.statistics()


@pytest.mark.parametrize("bits", [1.5, 4.0, "full"])
def test_a_completion_is_the_text_of_the_library(client, library, bits):
    answer = client.completions.create(**GREEDY, prompt="The cat", extra_body={"bits": bits})
    text, tokens, statistics = expected(library, "The cat", bits=bits, max_tokens=12, temperature=0)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.usage.prompt_tokens == len("The cat")
    assert answer.usage.realised_bits == pytest.approx(statistics.realised_bits, abs=1e-3)
    assert answer.usage.weight_bytes_per_token == pytest.approx(statistics.bytes_per_token, rel=1e-3)


def test_a_suffix_of_the_model_sets_the_bits(client):
    def text(model, **fields):
        return client.completions.create(**GREEDY | {"model": model}, prompt="The cat", **fields)

    low, field = text(f"{MODEL}@1.5"), text(MODEL, extra_body={"bits": 1.5})
    assert low.choices[0].text == field.choices[0].text
    assert low.usage.realised_bits == field.usage.realised_bits < text(f"{MODEL}@full").usage.realised_bits
    assert text(f"{MODEL}@1.5", extra_body={"bits": 1.5}).choices[0].text == low.choices[0].text
    with pytest.raises(openai.BadRequestError, match=r"asks for 1\.5 and the field for 3"):
        text(f"{MODEL}@1.5", extra_body={"bits": 3})


def test_a_chat_is_the_text_of_the_library_and_streams_as_it(client, library):
    settings = {"temperature": 1.0, "seed": 5}
    fields = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 20, **settings}
    answer = client.chat.completions.create(**fields)
    text, tokens, _ = expected(library, library.tokenizer.chat(MESSAGES), max_tokens=20, **settings)
    assert answer.choices[0].message.content == text
    assert answer.usage.completion_tokens == len(tokens)
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    *events, last = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == text
    assert events[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert last.choices == []
    assert last.usage.completion_tokens == len(tokens)
    assert {event.id for event in events} == {last.id}


def test_choices_differ_by_seed_and_stream_side_by_side(client, library):
    fields = {"model": MODEL, "temperature": 1.0, "max_tokens": 10, "seed": 3, "n": 3}
    answer = client.completions.create(**fields, prompt=["one", "two"])
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert texts == [
        expected(library, prompt, temperature=1.0, max_tokens=10, seed=seed)[0]
        for prompt in ("one", "two")
        for seed in (3, 4, 5)
    ]
    streamed = [""] * 6
    for event in client.completions.create(**fields, prompt=["one", "two"], stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == texts


SAMPLING = {
    "top_p": 0.3,
    "top_k": 2,
    "min_p": 0.3,
    "presence_penalty": 2.0,
    "frequency_penalty": 2.0,
    "repetition_penalty": 1.8,
    "logit_bias": {97: 3.0},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_each_field_of_sampling_changes_the_text_as_in_the_library(client, library, name):
    settings = {"temperature": 1.0, "max_tokens": 24, "seed": 5}
    extra = {"ignore_eos": True, name: SAMPLING[name]}
    answer = client.completions.create(model=MODEL, prompt="abab", **settings, extra_body=extra)
    settings["stop_tokens"] = ()
    assert answer.choices[0].text == expected(library, "abab", **settings, **{name: SAMPLING[name]})[0]
    assert answer.choices[0].text != expected(library, "abab", **settings)[0]


def test_without_a_seed_samples_differ(client):
    def text():
        return (
            client.completions.create(model=MODEL, prompt="a", temperature=1.0, max_tokens=20).choices[0].text
        )

    assert text() != text()


def test_prompts_of_tokens_echo_and_tokenize(client, server, library):
    tokens = library.tokenizer.encode("The cat")
    assert server.json("/v1/tokenize", {"prompt": "The cat"}) == (
        200,
        {"count": len(tokens), "max_model_len": 128, "tokens": tokens},
    )
    chat = library.tokenizer.chat(MESSAGES)
    assert server.json("/v1/tokenize", {"messages": MESSAGES})[1]["tokens"] == chat
    assert server.json("/v1/detokenize", {"tokens": tokens}) == (200, {"prompt": "The cat"})
    chat_text = server.json("/v1/detokenize", {"tokens": chat})[1]["prompt"]
    assert chat_text == library.tokenizer.chat_text(MESSAGES)
    again = {"prompt": chat_text, "add_special_tokens": False}
    assert server.json("/v1/tokenize", again)[1]["tokens"] == chat
    text = client.completions.create(**GREEDY, prompt="The cat").choices[0].text
    for prompt in (tokens, [tokens], "The cat", ["The cat"]):
        answer = client.completions.create(**GREEDY, prompt=prompt, echo=True)
        assert answer.choices[0].text == "The cat" + text
    assert server.json("/v1/detokenize", {"tokens": [99999]})[0] == 400


def test_stop_strings_and_stop_tokens(client):
    fields = {"model": MODEL, "prompt": "a", "temperature": 1.0, "seed": 1, "max_tokens": 60}
    text = client.completions.create(**fields, extra_body={"ignore_eos": True}).choices[0].text
    assert len(text) > 20
    stopped = client.completions.create(**fields, stop=[text[5:8], text[12:15]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[5:8])], "stop")
    bias = {"0": 100}  # a stop token of the model
    ended = client.completions.create(**fields, logit_bias=bias)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1


def test_log_probabilities(client):
    chat = client.chat.completions.create(
        **GREEDY, messages=MESSAGES, logprobs=True, top_logprobs=3, extra_body={"bits": 3}
    ).choices[0]
    content = chat.logprobs.content
    assert "".join(each.token for each in content) == chat.message.content or "\ufffd" in chat.message.content
    assert bytes(byte for each in content for byte in each.bytes).decode(errors="replace") == (
        chat.message.content
    )
    for each in content:
        assert each.top_logprobs[0].logprob == pytest.approx(each.logprob)  # greedy: the most likely token
        assert len(each.top_logprobs) == 3
        assert each.logprob <= 0
    stream = client.chat.completions.create(
        **GREEDY, messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, extra_body={"bits": 3}
    )
    streamed = [
        each for event in stream if event.choices[0].logprobs for each in event.choices[0].logprobs.content
    ]
    assert streamed == content
    text = client.completions.create(**GREEDY, prompt="The cat", logprobs=2).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) == 12
    assert all(len(top) == 2 for top in text.logprobs.top_logprobs)  # greedy: the token is one of them
    assert text.logprobs.text_offset[0] == 0


def test_positions_of_tokens_do_not_depend_on_the_text_that_a_stream_holds_back(client):
    fields = {"model": MODEL, "prompt": "日", "temperature": 1.0, "seed": 1, "max_tokens": 40, "logprobs": 5}
    fields["extra_body"] = {"ignore_eos": True}
    text = client.completions.create(**fields).choices[0].text
    fields["stop"] = text[5:] + "?"  # nearly all of the text may belong to it
    whole = client.completions.create(**fields, echo=True).choices[0]
    assert whole.text == "日" + text
    assert whole.logprobs.text_offset[:4] == [0, 0, 0, 1]
    assert all(5 <= len(top) <= 6 for top in whole.logprobs.top_logprobs[1:])
    streamed = [event.choices[0] for event in client.completions.create(**fields, echo=True, stream=True)]
    parts = [choice.logprobs for choice in streamed if choice.logprobs]
    assert [offset for part in parts for offset in part.text_offset] == whole.logprobs.text_offset
    assert [token for part in parts for token in part.tokens] == whole.logprobs.tokens


def test_log_probabilities_of_a_prompt_are_those_of_the_library(client, library):
    prompt = "The cat sat"
    fields = {"model": MODEL, "prompt": prompt, "temperature": 0, "echo": True, "logprobs": 2}
    alone = client.completions.create(**fields, max_tokens=0)
    assert (alone.choices[0].text, alone.usage.completion_tokens) == (prompt, 0)
    scored = alone.choices[0].logprobs
    assert scored.tokens == list(prompt)
    assert scored.text_offset == list(range(len(prompt)))
    assert scored.token_logprobs[0] is scored.top_logprobs[0] is None
    tokens = np.array([library.tokenizer.encode(prompt)])
    expected = jax.nn.log_softmax(forward(library.model, tokens)[0], axis=-1)
    np.testing.assert_allclose(
        scored.token_logprobs[1:], [expected[i, tokens[0, i + 1]] for i in range(len(prompt) - 1)], atol=1e-3
    )
    answer = client.completions.create(**fields, max_tokens=4).choices[0]
    assert answer.logprobs.token_logprobs[: len(prompt)] == scored.token_logprobs
    assert len(answer.logprobs.tokens) == len(prompt) + 4
    streamed = [event.choices[0] for event in client.completions.create(**fields, max_tokens=4, stream=True)]
    assert "".join(event.text for event in streamed) == answer.text
    parts = [event.logprobs for event in streamed if event.logprobs]
    assert [value for part in parts for value in part.token_logprobs] == answer.logprobs.token_logprobs


def test_models(client, server):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == (MODEL, "grinqh-jax", 128)
    assert model.bits == {"least": 1.0, "most": 8.0, "default": 4.0}
    assert client.models.retrieve(f"{MODEL}@2.5").id == f"{MODEL}@2.5"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; this server has tiny"):
        client.models.retrieve("other")
    assert server.json("/health") == (200, {"status": "ok"})


def test_other_methods(server):
    def request(method: str, path: str) -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        with server.connect() as sock:
            sock.sendall(head.encode())
            received = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        head, _, body = received.partition(b"\r\n\r\n")
        assert b"content-length: " in head
        return int(head.split()[1]), head if method != "HEAD" else body

    for path in ("/v1/models", "/v1/models/tiny@2", "/health", "/"):
        assert request("HEAD", path) == (200, b"")
    status, head = request("OPTIONS", "/v1/models")  # without --cors-origin
    assert (status, b"allow: GET, HEAD" in head or b"allow: HEAD, GET" in head) == (405, True)
    assert request("PUT", "/v1/completions")[0] == 405
    assert request("HEAD", "/v1/models/other")[0] == 404


def test_a_chat_without_a_limit_ends_with_the_context(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=1.0, seed=1, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == 128
    assert answer.choices[0].finish_reason == "length"


def test_metrics_count_answers(client, server):
    names = ("grinqh_answers_total", "grinqh_generated_tokens_total", "grinqh_realised_bits_count")
    before = [server.metric(name) for name in names]
    client.completions.create(**GREEDY, prompt="The cat", n=2)
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 24, 2]
    assert server.metric("grinqh_slots") == 2
    assert server.metric("grinqh_time_to_first_event_seconds_count") >= 2
    assert server.metric("grinqh_weight_bytes_read_total") > 0


def test_a_client_that_leaves_frees_its_slot(client, server):
    fields = {"model": MODEL, "prompt": "a", "temperature": 1.0, "max_tokens": 120, "stream": True}
    before = server.metric("grinqh_answers_total")
    for n in (1, 3, 8):  # running, and waiting for a slot
        stream = client.completions.create(**fields, n=n, extra_body={"ignore_eos": True})
        next(stream)
        stream.close()
    with server.connect() as sock:  # not a stream
        body = json.dumps(fields | {"stream": False, "n": 8, "ignore_eos": True}).encode()
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        sock.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        time.sleep(0.2)
    deadline = time.monotonic() + 20
    while server.metric("grinqh_answers_total") < before + 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    while server.metric("grinqh_cache_pages_in_use") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("grinqh_answers_total") == before + 20
    assert server.metric("grinqh_cache_pages_in_use") == 0
    assert server.metric("grinqh_answers_decoding") == server.metric("grinqh_answers_waiting") == 0
