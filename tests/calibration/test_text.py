"""Calibration text: the windows, and how they are split."""

import re

import numpy as np
import pytest

from checkpoints_tools.calibration import text
from grinqh_jax.errors import UsageError


def encode(piece):
    """Encodes each letter as one token."""
    return [ord(letter) for letter in piece]


def test_windows_are_spread_over_the_whole_text():
    content = "".join(chr(32 + i // 100) for i in range(9000))
    windows = text.windows(content, encode, tokens=500, length=100)
    assert windows.shape == (5, 100)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows[:, 0], 32 + np.arange(5) * 18)


def test_a_short_text_gives_fewer_and_shorter_windows():
    assert text.windows("x" * 1900, encode, tokens=16384, length=100).shape == (3, 100)
    assert text.windows("x" * 300, encode, tokens=16384, length=1024).shape == (1, 300)
    assert text.windows("x" * 9000, encode, tokens=300, length=1024).shape == (1, 300)
    with pytest.raises(
        UsageError, match="255 tokens from 255 characters; give a text of at least 256 tokens"
    ):
        text.windows("x" * 255, encode, tokens=16384, length=1024)


def encode_runs(piece):
    """Encodes a run of up to 64 blanks as one token, as many tokenizers do, and each letter as one."""
    return [ord(run[0]) for run in re.findall(" {1,64}|[^ ]", piece)]


@pytest.mark.parametrize("start", [0, 40_000, 98_000, 199_999])
@pytest.mark.parametrize("blanks", [100, 20_000, 60_000])
def test_a_run_of_blanks_cuts_no_other_window(start, blanks):
    content = "abcdefghi " * 20_000
    content = content[:start] + " " * blanks + content[start:]
    windows = text.windows(content, encode_runs, tokens=32768, length=1024)
    assert windows.shape == (32, 1024)
    assert np.mean(windows == ord(" ")) < 0.15


def test_windows_that_replace_others_share_no_token():
    content = "".join(chr(256 + i) for i in range(30_000)) + " " * 10_000
    windows = text.windows(content, encode_runs, tokens=4000, length=200)
    letters = windows[windows != ord(" ")].tolist()
    assert windows.shape == (20, 200)
    assert len(letters) == len(set(letters))
    assert letters == sorted(letters)


def test_a_text_of_blanks_is_refused_with_the_reason():
    with pytest.raises(UsageError, match="should yield 32768; remove runs of blanks"):
        text.windows("word " * 500 + " " * 500_000, encode_runs, tokens=32768, length=1024)


def test_one_short_span_shortens_no_other():
    content = "x" * 6000 + " " * 600  # 11 spans; each but the last yields 90 tokens, and the last 10
    windows = text.windows(content, lambda piece: encode_runs(piece)[:90], tokens=1100, length=100)
    assert windows.shape == (10, 90)


@pytest.mark.parametrize(
    ("windows", "first", "second"),
    [(1, [0], [0]), (2, [0], [1]), (3, [0, 1], [2]), (9, [0, 1, 2, 4, 5, 6, 8], [3, 7])],
)
def test_the_two_sets_of_windows_share_no_token(windows, first, second):
    tokens = np.arange(windows * 10, dtype=np.int32).reshape(windows, 10)
    most, others = text.split_windows(tokens)
    assert (most[:, 0] // 10).tolist() == first
    assert (others[:, 0] // 10).tolist() == second
    assert most.shape[1] == others.shape[1] == (5 if windows == 1 else 10)
    assert not set(most.reshape(-1).tolist()) & set(others.reshape(-1).tolist())
