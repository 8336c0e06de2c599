"""Reasoning and tool calls in answers, cut into pieces at every position."""

import json
import random

import pytest

from grinqh_jax.server.answer_parser import AnswerParser

NAMES = {"names": ["weather", "add"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WEATHER = ("weather", {"city": "Köln"})
ADD = ("add", {"a": 1})
QWEN, LLAMA = {"tools": "tags"} | NAMES, {"tools": "json"} | NAMES
EXACT = {"exact": True}
BRACES = 'x}]"\\ {'
TRICKY = f'{{"name": "add", "arguments": {json.dumps({"a": [BRACES, {"b": BRACES}]})}}}'

CASES = {
    "content": ({}, "Hello <think> world", "", "Hello <think> world", []),
    "reasoning": ({"reasons": True}, "<think>\nHm.\n\nSo.\n</think>\n\nYes.", "Hm.\n\nSo.", "Yes.", []),
    "the prompt began the reasoning": ({"reasoning": True}, "\nHm.\n</think>\n\nYes.", "Hm.", "Yes.", []),
    "unfinished reasoning": ({"reasons": True}, "<think>\nHm. </thi", "Hm. </thi", "", []),
    "no reasoning": ({"reasons": True}, "The <think> tag", "", "The <think> tag", []),
    "empty reasoning": ({"reasons": True}, "<think>\n\n</think>\n\nYes.", "", "Yes.", []),
    "a call": (QWEN, CALL, "", "", [WEATHER]),
    "text and two calls": (
        QWEN,
        f'I look. {CALL}\n<tool_call>\n{{"name": "add", "arguments": {{"a": 1}}}}\n</tool_call>',
        "",
        "I look. ",
        [WEATHER, ADD],
    ),
    "reasoning and a call": (
        QWEN | {"reasons": True},
        f"<think>\nHm.\n</think>\n\n{CALL}",
        "Hm.",
        "",
        [WEATHER],
    ),
    "a call of another function": (
        QWEN,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        "",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    "a call that is no JSON": (QWEN, "<tool_call>{</tool_call> x", "", "<tool_call>{</tool_call> x", []),
    "a call whose name is no text": (
        QWEN,
        '<tool_call>{"name": ["add"]}</tool_call>',
        "",
        '<tool_call>{"name": ["add"]}</tool_call>',
        [],
    ),
    "an unfinished call": (QWEN, 'a <tool_call>\n{"name"', "", 'a <tool_call>\n{"name"', []),
    "a deep call": (
        QWEN,
        f"<tool_call>{'[' * 9000}</tool_call>",
        "",
        f"<tool_call>{'[' * 9000}</tool_call>",
        [],
    ),
    "tags without tools": ({}, CALL, "", CALL, []),
    "Llama 3": (LLAMA, '{"name": "weather", "parameters": {"city": "Köln"}}', "", "", [WEATHER]),
    "Llama 3, two calls": (
        LLAMA,
        '{"name": "weather", "parameters": {"city": "Köln"}}; {"name": "add", "parameters": {"a": 1}}',
        "",
        "",
        [WEATHER, ADD],
    ),
    "Llama 3, other JSON": (LLAMA, '{"answer": 3}', "", '{"answer": 3}', []),
    "Llama 3, text behind": (LLAMA, '{"name": "add"} now', "", '{"name": "add"} now', []),
    "an exact call": (QWEN | EXACT, CALL, "", "", [WEATHER]),
    "text and two exact calls, one with brackets in texts": (
        QWEN | EXACT,
        f"I look. <tool_call>\n{TRICKY}\n</tool_call>\n{CALL}",
        "",
        "I look. ",
        [("add", {"a": [BRACES, {"b": BRACES}]}), WEATHER],
    ),
    "reasoning and an exact call": (
        QWEN | EXACT | {"reasoning": True},
        f"Hm.\n</think>\n\n{CALL}",
        "Hm.",
        "",
        [WEATHER],
    ),
    "Llama 3, two exact calls": (
        LLAMA | EXACT,
        f'{TRICKY}; {{"name": "weather", "arguments": {{"city": "Köln"}}}}'.replace(
            "arguments", "parameters"
        ),
        "",
        "",
        [("add", {"a": [BRACES, {"b": BRACES}]}), WEATHER],
    ),
    "Llama 3, other exact JSON": (LLAMA | EXACT, '{"name": "x"}', "", '{"name": "x"}', []),
    "an exact call that ends in its name": (
        QWEN | EXACT,
        '<tool_call>\n{"name": "wea',
        "",
        '<tool_call>\n{"name": "wea',
        [],
    ),
    "Llama 3, text": (LLAMA, "It is {warm}", "", "It is {warm}", []),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_parsed_the_same_in_any_pieces(case):
    options, text, reasoning, content, calls = CASES[case]
    rng = random.Random(case)
    for pieces in ([text], [*text[:2000], text[2000:]], cut(text, rng), cut(text, rng)):
        parser = AnswerParser(**options)
        deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.flush()
        parts = {
            kind: "".join(delta.text for delta in deltas if delta.kind == kind)
            for kind in ("reasoning", "content")
        }
        assert parts == {"reasoning": reasoning, "content": content}
        arguments = [each.call.arguments for each in deltas if each.call]
        for each in deltas:
            if each.kind == "arguments":
                arguments[each.index] += each.text
        found = [
            (each.call.name, json.loads(text))
            for each, text in zip([each for each in deltas if each.call], arguments, strict=True)
        ]
        assert found == calls
        assert parser.calls == len(calls)
        ids = [each.call.id for each in deltas if each.call]
        assert len(set(ids)) == len(ids)


def cut(text: str, rng: random.Random) -> list[str]:
    """A text in random pieces."""
    ends = sorted(rng.randrange(len(text) + 1) for _ in range(6))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def test_text_that_cannot_begin_a_tag_is_passed_on_at_once():
    parser = AnswerParser(**QWEN, reasons=True)
    assert [delta.text for delta in parser.push("Hello, wor")] == ["Hello, wor"]
    assert [delta.text for delta in parser.push("ld <tool")] == ["ld "]
    assert [delta.text for delta in parser.push("s>")] == ["<tools>"]


def test_arguments_of_exact_calls_are_passed_on_as_they_arrive():
    parser, seen = AnswerParser(**QWEN, exact=True), ""
    for character in CALL:
        for delta in parser.push(character):
            seen += {"call": f"{delta.call and delta.call.name}:"}.get(delta.kind, delta.text)
        if character == "K":
            assert seen == 'weather:{"city": "K'
    assert seen == 'weather:{"city": "Köln"}'
