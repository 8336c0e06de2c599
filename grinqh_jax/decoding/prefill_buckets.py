"""Cuts prompts into prefill buckets: pieces padded to few widths, so that few programs are compiled."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from grinqh_jax.decoding.engine import PREVIEW_TOKENS

SMALLEST_BUCKET, LARGEST_BUCKET = 32, 2048
"""Widths of the smallest and the largest bucket. Buckets have 32, 64, ... 2048 positions."""

CONVERSATION_WIDTHS = (PREVIEW_TOKENS, 512)
"""Widths of the buckets of a conversation. There are only two, because the growing turns would otherwise need
a program for each width, one after another."""


@dataclasses.dataclass(frozen=True)
class PrefillBucket:
    """One piece of a batch of prompts.

    Attributes:
      tokens: int32 ``[B, width]``, padded with zeros.
      lengths: int32 ``[B]``, number of tokens of each row.
      end: Position after the last token of the longest row.
    """

    tokens: Int[np.ndarray, "b width"]
    lengths: Int[np.ndarray, "b"]
    end: int


def cut(
    prompts: Sequence[Sequence[int]], start: int = 0, largest: int | None = None
) -> Iterator[PrefillBucket]:
    """Yields the buckets of a batch of prompts, from position ``start`` on.

    All buckets but the last end at multiples of the largest width, by default ``LARGEST_BUCKET``, for any
    ``start``, so that the previews of the last buckets cover the same tokens (see ``first_previewed``).
    """
    largest = largest or LARGEST_BUCKET
    longest = max(len(prompt) for prompt in prompts)
    while start < longest:
        end = min(longest, (start // largest + 1) * largest)
        width = bucket_widths(end - start)[-1]
        tokens = np.zeros((len(prompts), width), np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start:end]
            tokens[row, : len(piece)] = piece
            lengths[row] = len(piece)
        yield PrefillBucket(tokens, lengths, end)
        start = end


def bucket_widths(largest: int) -> list[int]:
    """Returns the widths of all buckets of at most ``largest`` tokens, ascending."""
    widths = [SMALLEST_BUCKET]
    while widths[-1] < largest:
        widths.append(2 * widths[-1])
    return widths


def cut_conversation(prompt: Sequence[int], start: int = 0) -> Iterator[PrefillBucket]:
    """Cuts a prompt into buckets of the ``CONVERSATION_WIDTHS``, from position ``start`` on.

    The text is the same as with ``cut``, because one bucket has exactly the tokens whose preview the dial
    uses, and ``merge_previews`` selects that bucket.
    """
    small, large = CONVERSATION_WIDTHS
    preview = max(first_previewed(len(prompt)), start)
    boundaries = preview, min(preview + PREVIEW_TOKENS, len(prompt)), len(prompt)
    while start < len(prompt):
        left = next(boundary for boundary in boundaries if boundary > start) - start
        width = large if left > large // 2 else small
        end = start + min(left, width)
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : end - start] = prompt[start:end]
        yield PrefillBucket(tokens, np.array([end - start], np.int32), end)
        start = end


def first_previewed(length: int, largest: int | None = None) -> int:
    """Returns the first position whose tokens must be read for the preview of a prompt of ``length`` tokens.

    The dial uses the preview of the last ``PREVIEW_TOKENS`` tokens of the last bucket, or of the bucket
    before it if the last one has fewer tokens (see ``engine.merge_previews``). ``largest`` is as in ``cut``.
    """
    largest = largest or LARGEST_BUCKET
    last_bucket = (length - 1) // largest * largest
    end = last_bucket if last_bucket > 0 and length - last_bucket < PREVIEW_TOKENS else length
    return max(end - PREVIEW_TOKENS, 0)
