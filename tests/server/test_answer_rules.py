"""Rules of answers, with llguidance on texts that fit and texts that do not."""

import pytest

from grinqh_jax.errors import UsageError
from grinqh_jax.server.answer_rules import CallableFunction, call_rules, json_rules
from grinqh_jax.serving.grammar import Grammars

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/a"}}, "required": ["city"]}
CITY |= {"additionalProperties": False, "$defs": {"a": {"type": "string"}}}
FUNCTIONS = [CallableFunction("weather", CITY, "x"), CallableFunction("wear", {"type": "object"}, "y")]
ANSWER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
ANSWER |= {"additionalProperties": False}
THOUGHT = "Hm, <tool_call> or {?\n</think>\n\n"


def call(form: str, name: str = "weather", arguments: str = '{"city": "Köln"}') -> str:
    if form == "tags":
        return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def several(form: str) -> str:
    return ("\n" if form == "tags" else "; ").join([call(form), call(form, "wear", "{}")])


@pytest.fixture(scope="module")
def fits(generator):
    """A function that says whether a text fits rules: wholly, so far, or not."""
    grammars = Grammars(generator)

    def fits(rules, text: str) -> str:
        grammar = grammars.of_rules(rules.text, rules.schemas)
        tokens = generator.tokenizer.encode(text)
        for i, token in enumerate(tokens):
            try:
                mask = grammar.allowed()
            except UsageError:  # nothing may follow
                return "no"
            if not mask[token // 32] >> (token % 32) & 1:
                return "no"
            if grammar.push(token):
                return "wholly" if i == len(tokens) - 1 else "no"
        end = next(iter(generator.defaults.eos_tokens))
        return "wholly" if grammar.allowed()[end // 32] >> (end % 32) & 1 else "so far"

    return fits


OPTIONS = {"forced": False, "parallel": True, "schema": None, "reasoning": "none"}


@pytest.mark.parametrize("form", ["tags", "json"])
def test_a_forced_answer_is_calls(fits, form):
    rules = call_rules(FUNCTIONS, form, **OPTIONS | {"forced": True})
    for text in (call(form), several(form), call(form, "wear", '{"a": [1, {"b": "}"}]}')):
        assert fits(rules, text) == "wholly"
        assert fits(rules, text[:-1]) == "so far"
    for text in (
        "I",
        call(form, "other"),
        call(form, arguments='{"town": "Ulm"}'),
        call(form, arguments="3"),
    ):
        assert fits(rules, text) == "no"
    one = call_rules(FUNCTIONS, form, **OPTIONS | {"forced": True, "parallel": False})
    assert (fits(one, call(form)), fits(one, several(form))) == ("wholly", "no")


@pytest.mark.parametrize("form", ["tags", "json"])
@pytest.mark.parametrize("parallel", [False, True])
def test_an_answer_may_be_text_but_its_calls_fit(fits, form, parallel):
    rules = call_rules(FUNCTIONS, form, **OPTIONS | {"parallel": parallel})
    expected = {"Hello {you}": "wholly", "": "wholly", call(form): "wholly"}
    expected |= {several(form): "wholly" if parallel else "no", call(form, "other"): "no"}
    if form == "tags":
        expected |= {f"I look. {call(form)}": "wholly", "I look. <tool_call>x": "no"}
        expected |= {f"{call(form)} bye": "wholly" if parallel else "no", "a <tool": "wholly"}
    assert {text: fits(rules, text) for text in expected} == expected


@pytest.mark.parametrize("form", ["tags", "json"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_call_may_follow_reasoning(fits, form, forced):
    options = OPTIONS | {"forced": forced}
    begun = call_rules(FUNCTIONS, form, **options | {"reasoning": "begun"})
    assert fits(begun, THOUGHT + several(form)) == "wholly"
    assert fits(begun, call(form)) == "so far"  # within the reasoning
    assert fits(begun, THOUGHT + call(form, "other")) == "no"
    possible = call_rules(FUNCTIONS, form, **options | {"reasoning": "possible"})
    assert fits(possible, call(form)) == "wholly"
    assert fits(possible, f"<think>{THOUGHT}{call(form)}") == "wholly"
    assert fits(possible, f"<think>{THOUGHT}{call(form, 'other')}") == "no"
    assert fits(possible, f"<think>{THOUGHT}Yes.") == ("no" if forced else "wholly")


@pytest.mark.parametrize("form", ["tags", "json"])
def test_an_answer_is_calls_or_fits_a_schema(fits, form):
    rules = call_rules(FUNCTIONS, form, **OPTIONS | {"schema": ANSWER})
    assert [fits(rules, text) for text in ('{"n": 3}', several(form))] == ["wholly", "wholly"]
    assert [fits(rules, text) for text in ('{"m": 3}', call(form, "other"), "x")] == ["no"] * 3


def test_json_may_follow_reasoning(fits):
    assert fits(json_rules(ANSWER), '{"n": 3}') == "wholly"
    assert fits(json_rules(ANSWER), '<think>x</think>{"n": 3}') == "no"
    assert fits(json_rules(ANSWER, "possible"), f'<think>{THOUGHT}{{"n": 3}}') == "wholly"
    assert fits(json_rules(ANSWER, "possible"), '{"n": 3}') == "wholly"
    assert fits(json_rules(ANSWER, "begun"), f'{THOUGHT}{{"n": 3}}') == "wholly"
