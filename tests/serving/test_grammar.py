"""Answers that fit a JSON schema, and their company."""

import dataclasses
import json

import pytest
from engine_cases import SHORT, SIZES

from grinqh_jax.decoding.request import Request
from grinqh_jax.errors import UsageError
from grinqh_jax.serving.engine import Engine
from grinqh_jax.serving.errors import EngineError
from grinqh_jax.serving.grammar import MOST_REFERENCES, Grammar

# They compile an engine. By default the tests of the server check its core.
pytestmark = pytest.mark.slow

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SAMPLED = Request(max_tokens=90, bits=3.0, temperature=1.0, seed=5)
PLAIN = [
    ([7, 8, 9], Request(max_tokens=60, bits=2.0, temperature=0.0, stop_tokens=())),
    ([40, 41], Request(max_tokens=50, bits=5.0, temperature=1.0, seed=3, stop_tokens=())),
]


def assert_person(text: str) -> None:
    person = json.loads(text)
    assert sorted(person) == ["age", "kind", "name"]
    assert len(person["name"]) <= 6
    assert 0 <= person["age"] <= 99
    assert person["kind"] in ("cat", "dog")


def test_answers_fit_the_schema_and_change_no_other_answer(engine, compilations):
    alone = [engine.generate_many([prompt], request)[0] for prompt, request in PLAIN]
    compilations.clear()
    grammar = engine.grammar(PERSON)
    requests = [dataclasses.replace(SAMPLED, seed=seed) for seed in range(6)]
    people = [engine.submit([50, 51], request, grammar=grammar) for request in requests[:3]]
    company = [engine.submit(prompt, request, top_logprobs=1) for prompt, request in PLAIN]
    people += [engine.submit([50, 51], request, grammar=grammar) for request in requests[3:]]
    for person in people:
        person.result(60)
        assert person.finish_reason == "stop"
        assert_person(person.text)
    assert len({person.text for person in people}) > 1
    for answer, expected in zip(company, alone, strict=True):
        assert answer.result(60) == expected.text
        assert answer.tokens == expected.tokens
        assert len(answer.logprobs) == len(answer.tokens)
    assert not compilations
    assert engine.storage.allocator.in_use == 0


def test_an_answer_with_a_grammar_needs_no_stop_token(engine):
    request = dataclasses.replace(SAMPLED, stop_tokens=())
    answer = engine.submit([50, 51], request, grammar=engine.grammar(PERSON))
    assert_person(answer.result(60))
    assert answer.finish_reason == "stop"
    cut = engine.submit([50, 51], dataclasses.replace(SAMPLED, max_tokens=5), grammar=engine.grammar(PERSON))
    assert answer.text.startswith(cut.result(60))
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 5)


class Failing(Grammar):
    """A grammar that fails after some tokens."""

    def __init__(self, grammar: Grammar, left: int):
        super().__init__(grammar._matcher, grammar._words)
        self._left = left

    def copy(self):
        return Failing(super().copy(), self._left)

    def allowed(self):
        self._left -= 1
        if self._left < 0:
            raise UsageError("too complex")
        return super().allowed()


@pytest.mark.parametrize("after", [0, 3])
def test_a_grammar_that_fails_ends_its_answer_alone(engine, after):
    broken = engine.submit([5, 6], SAMPLED, grammar=Failing(engine.grammar(PERSON), after))
    prompt, request = PLAIN[0]
    other = engine.submit(prompt, request)
    with pytest.raises(EngineError, match="the answer failed: UsageError\\('too complex'\\)"):
        broken.result(60)
    assert len(broken.tokens) == after
    assert other.result(60) == engine.generate_many([prompt], request)[0].text
    assert engine.storage.allocator.in_use == 0
    assert len(engine.scheduler._free_slots) == SIZES["slots"]


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


WRONG = {
    "unknown type": ({"type": "objekt"}, "Invalid type: objekt"),
    "nothing fits": ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable schema"),
    "nothing fits at all": ({"$ref": "#"}, "the schema is not supported"),
    "unknown reference": ({"$ref": "#/definitions/x"}, "does not exist"),
    "network": ({"$ref": "https://example.com/schema.json"}, "does not fetch resources"),
    "file": ({"$ref": "file:///etc/passwd"}, "does not fetch resources"),
    "bad pattern": ({"type": "string", "pattern": "("}, "unclosed group"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "not": ({"not": {}}, "Unimplemented keys"),
    "deep": (nested(90), "recursion limit exceeded"),
    "too deep for Python": (nested(900), "nested too deeply"),
    "huge": (
        {"type": "object", "properties": {f"p{i}": {} for i in range(30_000)}},
        "more than 2000 objects",
    ),
    "chain of references": (
        {"$ref": "#/$defs/0", "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(1900)}},
        "256 different references",
    ),
    "product": (
        {"allOf": [{"anyOf": [{"type": "string", "maxLength": i} for i in range(30)]}] * 8},
        "too large",
    ),
}


@pytest.mark.parametrize("link", [lambda a: a, lambda a: {"properties": {"a": a}, "required": ["a"]}])
def test_the_longest_chain_of_references_compiles(engine, link):
    """A longer one could overflow the stack of a thread."""
    chain = {f"{i}": link({"$ref": f"#/$defs/{i + 1}"}) for i in range(MOST_REFERENCES - 1)}
    schema = {"$ref": "#/$defs/0", "$defs": chain | {f"{MOST_REFERENCES - 1}": {"type": "null"}}}
    assert engine.grammar(schema).allowed().any()


@pytest.mark.parametrize("name", WRONG)
def test_a_schema_that_is_wrong_or_not_supported_is_refused(engine, name):
    schema, message = WRONG[name]
    with pytest.raises(UsageError, match=message) as error:
        engine.grammar(schema)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_an_engine_without_grammars_refuses_them(engine, monkeypatch):
    grammar = engine.grammar(PERSON)
    monkeypatch.setattr(engine, "shape", dataclasses.replace(engine.shape, grammars=False))
    with pytest.raises(UsageError, match="needs an engine created with grammars=True"):
        engine.submit([5], grammar=grammar)
    with pytest.raises(UsageError, match="needs an engine created with grammars=True"):
        engine.grammar(PERSON)


def test_with_chunks_ahead_the_answers_are_the_same(generator, engine):
    ahead = dataclasses.replace(SHORT, early_exit=False, chunks_ahead=1)
    texts = []
    with Engine(generator, **SIZES, grammars=True, policy=ahead) as other:
        for each in (engine, other):
            answers = [each.submit(prompt, request) for prompt, request in PLAIN]
            answers += [each.submit([50, 51], SAMPLED, grammar=each.grammar(PERSON)) for _ in range(2)]
            answers += [each.submit(prompt, request) for prompt, request in PLAIN]
            texts.append([answer.result(60) for answer in answers])
    assert texts[0] == texts[1]
    assert_person(texts[1][2])
