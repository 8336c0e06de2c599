"""Calibration text: the windows, and how they are split."""

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
