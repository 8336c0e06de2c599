"""Answers in JSON, as OpenAI's official client asks for them."""

import json
import time

import openai
import pydantic
import pytest

MODEL = "tiny"
MESSAGES = [{"role": "user", "content": "Who?"}]
FIELDS = {"model": MODEL, "messages": MESSAGES, "temperature": 1.0, "seed": 2}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, le=99)


def json_schema(schema, **fields) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema} | fields}


def test_the_client_parses_answers_as_its_classes(client):
    answer = client.chat.completions.parse(**FIELDS, response_format=Person, n=2)
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Person)
        assert choice.finish_reason == "stop"
    with client.chat.completions.stream(**FIELDS, response_format=Person) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_the_vocabulary_is_converted_before_the_first_request(library_engine):
    """The conversion keeps Python's lock, up to a second, and running answers would wait."""
    assert library_engine._grammars._vocabulary is not None


def test_any_object_and_text(client):
    answer = client.chat.completions.create(**FIELDS, response_format={"type": "json_object"}, max_tokens=60)
    (choice,) = answer.choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.startswith("{")
    neutral = client.chat.completions.create(**FIELDS, response_format={"type": "text"}, max_tokens=9)
    assert neutral.choices == client.chat.completions.create(**FIELDS, max_tokens=9).choices


def test_texts_are_constrained_too(client):
    answer = client.completions.create(
        model=MODEL,
        prompt=["a", "b"],
        logprobs=1,
        extra_body={"response_format": json_schema({"enum": ["yes", "no"]})},
    )
    assert {choice.text for choice in answer.choices} <= {'"yes"', '"no"'}
    assert all(len(choice.logprobs.tokens) >= 4 for choice in answer.choices)


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


WRONG = {
    "unknown kind": ({"type": "yaml"}, "response_format"),
    "no schema": ({"type": "json_schema"}, "response_format"),
    "no name": ({"type": "json_schema", "json_schema": {"schema": {}}}, "name"),
    "a list": (json_schema([1]), "response_format"),
    "unknown type": (json_schema({"type": "objekt"}), "Invalid type: objekt"),
    "contradiction": (json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "Unsatisfiable"),
    "file": (json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    "deep": (json_schema(nested(90)), "recursion limit"),
    "chain of references": (
        json_schema(
            {"$ref": "#/$defs/0", "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(1900)}}
        ),
        "different references",
    ),
    "huge": (json_schema({"properties": {f"p{i}": {} for i in range(5000)}}), "response_format"),
    "pattern": (json_schema({"type": "string", "pattern": "((a{1,999}){1,999}"}), "unclosed group"),
    "infinite": (json_schema({"$ref": "#"}), "response_format"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_schemas_are_refused_by_name(client, name, stream):
    response_format, message = WRONG[name]
    started = time.monotonic()
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**FIELDS, response_format=response_format, stream=stream)
    assert message in str(raised.value.body)
    assert raised.value.body["type"] == "invalid_request_error"
    assert time.monotonic() - started < 10
