"""Arrays that the host makes from a prompt and from the tokens that an answer may choose."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt32


def masks(
    rows: int, vocab_size: int, allowed: Mapping[int, UInt32[np.ndarray, "words"]]
) -> UInt32[np.ndarray, "rows words"]:
    """Returns masks of allowed tokens, a bit for each; rows that ``allowed`` lacks may choose every token."""
    every = np.full((rows, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    for row, mask in allowed.items():
        every[row] = mask
    return every


def in_prompt(prompt: Sequence[int], vocab_size: int) -> Bool[np.ndarray, "1 vocab"]:
    """Returns which tokens a prompt has."""
    out = np.zeros((1, vocab_size), bool)
    out[0, np.asarray(prompt, np.int32)] = True
    return out


def padded(prompt: Sequence[int], size: int) -> Int32[np.ndarray, "1 size"]:
    """Returns the tokens of a prompt, followed by zeros."""
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(prompt)] = prompt
    return tokens
