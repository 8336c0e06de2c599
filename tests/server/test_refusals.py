"""Fields that the server refuses, each by its name, as OpenAI's official client sees it."""

import typing

import openai
import pytest
from openai.types import completion_create_params as text_create_params
from openai.types.chat import completion_create_params

from grinqh_jax.server.schema import ChatCompletion, Completion
from grinqh_jax.server.unsupported import LABELS, NEUTRAL

MODEL = "tiny"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12}


WRONG = [
    ({"model": "gpt"}, openai.NotFoundError, "model", "'gpt' does not exist; this server has tiny"),
    (
        {"model": "tiny@9"},
        openai.BadRequestError,
        "model",
        "'9' is neither a number of bits up to 8 nor full",
    ),
    ({"model": "tiny@"}, openai.BadRequestError, "model", "'' is neither"),
    ({"model": "tiny@nan"}, openai.BadRequestError, "model", "'nan' is neither"),
    ({"model": "tiny@0_3"}, openai.BadRequestError, "model", "'0_3' is neither"),
    ({"extra_body": {"bits": 0.5}}, openai.BadRequestError, "bits", "dial goes from 1 to 8"),
    ({"extra_body": {"bits": "3"}}, openai.BadRequestError, "bits", "bits"),
    ({"extra_body": {"bits": 80}}, openai.BadRequestError, "bits", "less than or equal to 8"),
    ({"temperature": -1}, openai.BadRequestError, "temperature", "greater than or equal to 0"),
    ({"top_p": 0}, openai.BadRequestError, "top_p", "top_p"),
    ({"top_p": 1.5}, openai.BadRequestError, "top_p", "less than or equal to 1"),
    ({"max_tokens": -1}, openai.BadRequestError, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "max_tokens: 0 only with echo"),
    ({"max_tokens": 1.5}, openai.BadRequestError, "max_tokens", "valid integer"),
    ({"max_tokens": 300}, openai.BadRequestError, "max_tokens", "the context holds 128, an answer of 300"),
    ({"n": 0}, openai.BadRequestError, "n", "greater than or equal to 1"),
    ({"n": 100}, openai.BadRequestError, None, "asks for 100 answers and the server holds 64"),
    ({"stop": ""}, openai.BadRequestError, "stop", "a stop string is empty"),
    ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias", "'x' is not a token id"),
    ({"logit_bias": {"5000": 1}}, openai.BadRequestError, "logit_bias", "5000"),
    ({"logit_bias": {"5": 101}}, openai.BadRequestError, "logit_bias", "less than or equal to 100"),
    (
        {"stream_options": {"include_usage": True}},
        openai.BadRequestError,
        "stream_options",
        "only with stream",
    ),
    ({"user": 3}, openai.BadRequestError, "user", "user: expected a string"),
    ({"extra_body": {"best_of": 3}}, openai.BadRequestError, "best_of", "best_of is not supported"),
    ({"extra_body": {"beams": 3}}, openai.BadRequestError, "beams", "'beams' is not a field"),
]


@pytest.mark.parametrize(("fields", "kind", "param", "message"), WRONG)
def test_wrong_fields_are_refused_by_name(client, fields, kind, param, message):
    with pytest.raises(kind) as raised:
        client.completions.create(**GREEDY | {"prompt": "a"} | fields)
    assert message in raised.value.body["message"]
    assert raised.value.body["param"] == param
    assert raised.value.body["type"] == "invalid_request_error"


UNSUPPORTED = {
    "reasoning_effort": "low",
    "audio": {"voice": "alloy", "format": "wav"},
    "store": True,
    "service_tier": "flex",
    "verbosity": "low",
    "functions": [{"name": "f"}],
}


def test_unsupported_fields_of_a_chat_are_refused_by_name_and_neutral_values_pass(client):
    for name, value in UNSUPPORTED.items():
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**GREEDY, messages=MESSAGES, **{name: value})
        assert raised.value.body["param"] == name
        assert raised.value.code == "unsupported_parameter"
    neutral = {"response_format": {"type": "text"}, "store": False, "service_tier": "auto", "user": "me"}
    neutral |= {"metadata": {"a": "b"}, "prompt_cache_retention": "24h", "parallel_tool_calls": False}
    named = [{**message, "name": "me"} for message in MESSAGES]
    assert client.chat.completions.create(**GREEDY, messages=named, **neutral).choices
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError, match="an answer of 300 included") as raised:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, **{name: 300})
        assert raised.value.body["param"] == name
    with pytest.raises(openai.BadRequestError, match="metadata: expected an object of strings"):
        client.chat.completions.create(**GREEDY, messages=MESSAGES, metadata={"a": 1})
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.user\.content"):
        client.chat.completions.create(**GREEDY, messages=image)


@pytest.mark.parametrize(
    ("parameters", "body"),
    [
        (completion_create_params.CompletionCreateParamsBase, ChatCompletion),
        (text_create_params.CompletionCreateParamsBase, Completion),
    ],
)
def test_each_field_of_the_client_is_supported_or_refused_by_name(parameters, body):
    fields = {*typing.get_type_hints(parameters), "stream"}
    assert len(fields) > 15
    assert fields - {*body.model_fields, *NEUTRAL, *LABELS} == set()


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(client):
    with pytest.raises(
        openai.BadRequestError, match="the prompt has 300 tokens and the context holds 128"
    ) as e:
        client.completions.create(**GREEDY, prompt="a" * 300)
    assert e.value.code == "context_length_exceeded"
