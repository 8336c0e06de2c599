"""Calibration text, tokenized and cut into windows of one length."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from grinqh_jax.errors import UsageError

DEFAULT_TEXT = Path(__file__).parents[1] / "data" / "calibration.txt"
MAX_WINDOW = 1024
_LEAST_TOKENS = 256
_CHARS_PER_TOKEN = 6
"""More than most tokens have: a span of so many characters a token is long enough for its window."""


def windows(
    text: str, encode: Callable[[str], Sequence[int]], tokens: int, length: int
) -> Int32[np.ndarray, "s t"]:
    """Token windows taken evenly from the whole text.

    Args:
      text: of any length; only spans of it are tokenized.
      encode: text to token ids.
      tokens: how many are wanted; rounded down to whole windows, fewer if the text has fewer.
      length: of a window; shorter if the text, or ``tokens``, is shorter than one.

    Raises:
      UsageError: the text gives fewer than 256 tokens, too few to place thresholds.
    """
    length = min(length, tokens)
    count = max(1, min(tokens // length, len(text) // (_CHARS_PER_TOKEN * length)))
    span = len(text) // count
    limit = 2 * _CHARS_PER_TOKEN * length
    rows = [encode(text[i * span : i * span + min(span, limit)])[:length] for i in range(count)]
    shortest = min(map(len, rows))
    if (total := shortest * count) < _LEAST_TOKENS:
        raise UsageError(
            f"calibration text: {total} tokens of {len(text)} characters, need {_LEAST_TOKENS} or more"
        )
    return np.array([row[:shortest] for row in rows], np.int32)


def windows_of_two_kinds(
    windows: Int32[np.ndarray, "s t"],
) -> tuple[Int32[np.ndarray, "a u"], Int32[np.ndarray, "b u"]]:
    """Three windows of every four, and the fourth; of fewer, the last one is apart; one is cut in halves."""
    if len(windows) == 1:
        middle = windows.shape[1] // 2
        return windows[:, :middle], windows[:, middle : 2 * middle]
    step = min(4, len(windows))
    apart = np.arange(len(windows)) % step == step - 1
    return windows[~apart], windows[apart]
