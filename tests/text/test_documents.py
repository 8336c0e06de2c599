"""Text from outside is valid Unicode, or refused with an error that names file and line."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.tasks import read_problems
from grinqh_jax.text.documents import read_documents
from grinqh_jax.text.tokenizer import Tokenizer
from grinqh_jax.text.unicode import check, decode, lone_surrogate

CUT = r'{"text": "cut emoji \ud83d"}'
CUT_TASK = r'{"question": "cut \ud83d", "answer": "#### 5"}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "fine"}', CUT], "line 2: half of a surrogate pair"),
        ([CUT_TASK], "line 1: half of a surrogate pair"),
        (['{"text": "a \\uDE00 b"}', "", CUT], "line 1, 3: half of a surrogate pair"),
        (["[", CUT], "line 1: expected a JSON object .*; line 2: half of a surrogate pair"),
    ],
)
def test_lone_surrogates_are_refused_with_their_lines(tmp_path, lines, message):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=f"^{re.escape(str(file))}: {message}"):
        read_documents(file)


def test_a_task_with_a_lone_surrogate_is_refused(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text(CUT_TASK)
    with pytest.raises(UsageError, match=r"tasks\.jsonl: line 1: half of a surrogate pair"):
        read_problems(file)


def test_whole_pairs_and_escapes_are_text(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "\\ud83d\\ude00 \\u00e9 \\\\ud83d"}\n')
    assert read_documents(file) == ["😀 é \\ud83d"]


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    for name in ("data.txt", "data.jsonl"):
        file = tmp_path / name
        file.write_bytes(b'{"text": "one"}\n{"text": "tw\xe9"}\n')
        message = rf"{name} is not UTF-8: byte 0xe9 at offset 28, line 2; convert it first"
        with pytest.raises(UsageError, match=message):
            read_documents(file)


strings = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.builds(lambda text: json.dumps({"text": text}).encode(), strings),
            st.builds(lambda q, a: json.dumps({"question": q, "answer": a}).encode(), strings, strings),
        ),
        max_size=6,
    )
)
def test_any_file_gives_unicode_or_an_error_of_one_line(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("any") / "data.jsonl"
    file.write_bytes(b"\n".join(lines))
    message = None
    try:
        documents = read_documents(file)
    except UsageError as error:
        message = str(error)
    if message is None:
        assert all(lone_surrogate(document) is None for document in documents)
    else:
        assert message.startswith(str(file))
        assert "\n" not in message
        assert lone_surrogate(message) is None


def test_text_from_a_program_is_checked_too(graded_directory):
    tokenizer = Tokenizer.load(graded_directory)
    with pytest.raises(UsageError, match=r"the text holds \\ud83d, half of a surrogate pair"):
        tokenizer.encode("cut \ud83d")
    assert check("whole 😀", "x") == "whole 😀"
    assert decode(b"\xef\xbb\xbfab", "x") == "ab"
