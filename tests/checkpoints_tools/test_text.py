"""Calibration text: what is read, what is refused, which windows are taken."""

import json

import numpy as np
import pytest

from checkpoints_tools.calibration import text
from grinqh_jax.errors import UsageError


def encode(piece):
    """A tokenizer with one token for each letter."""
    return [ord(letter) for letter in piece]


def test_windows_are_spread_over_the_whole_text():
    content = "".join(chr(32 + i // 100) for i in range(9000))
    windows = text.windows(content, encode, tokens=500, length=100)
    assert windows.shape == (5, 100)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows[:, 0], 32 + np.arange(5) * 18)


def test_a_short_text_gives_fewer_and_shorter_windows():
    assert text.windows("x" * 2700, encode, tokens=16384, length=100).shape == (3, 100)
    assert text.windows("x" * 300, encode, tokens=16384, length=1024).shape == (1, 300)
    assert text.windows("x" * 9000, encode, tokens=300, length=1024).shape == (1, 300)
    with pytest.raises(UsageError, match="255 tokens of 255 characters, need 256"):
        text.windows("x" * 255, encode, tokens=16384, length=1024)


def test_records_are_texts_or_tasks(tmp_path):
    file = tmp_path / "calib.jsonl"
    records = [{"text": "One."}, {"question": "1+1?", "answer": "2\n#### 2"}]
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert text.read_documents(file) == ["One.", "Question: 1+1?\nAnswer: 2\n#### 2"]


def test_every_bad_record_is_named(tmp_path):
    file = tmp_path / "calib.jsonl"
    file.write_text('{"text": "good"}\n{"text": 1}\n[]\n{"text": "\n')
    with pytest.raises(UsageError, match=r"line 2, 3, 4: expected an object"):
        text.read_documents(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n ", "holds no text"),
        (b"ab\xff", "not UTF-8 at byte 2"),
        (None, "No such"),
    ],
)
def test_what_is_not_text(tmp_path, content, message):
    file = tmp_path / "calib.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        text.read_documents(file)
