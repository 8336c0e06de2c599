"""Calibration text: which windows are taken of it."""

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
    assert text.windows("x" * 1900, encode, tokens=16384, length=100).shape == (3, 100)
    assert text.windows("x" * 300, encode, tokens=16384, length=1024).shape == (1, 300)
    assert text.windows("x" * 9000, encode, tokens=300, length=1024).shape == (1, 300)
    with pytest.raises(UsageError, match="255 tokens of 255 characters, need 256"):
        text.windows("x" * 255, encode, tokens=16384, length=1024)
