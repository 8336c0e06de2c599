"""Cuts prompts into prefill buckets: chunks padded to few widths, so that few programs are compiled."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from grinqh_jax.decoding.engine.prompt import PREVIEW_TOKENS

SMALLEST_BUCKET, LARGEST_BUCKET = 32, 2048
"""Widths of the smallest and the largest bucket. Buckets have 32, 64, ... 2048 positions."""

CONVERSATION_WIDTHS = (PREVIEW_TOKENS, 512)
"""Widths of the buckets of a conversation. There are only two, because the growing turns would otherwise need
a program for each width, one after another."""


@dataclasses.dataclass(frozen=True)
class PrefillBucket:
    """One prefill chunk of a batch of prompts, padded to the width of its bucket.

    Attributes:
      tokens: int32 ``[B, width]``, padded with the row's tokens again; zeros in a row without tokens. Equal
        tokens would choose the same experts of a mixture, and make a batch for one expert large.
      lengths: int32 ``[B]``, number of tokens of each row.
      end: Position after the last token of the longest row.
    """

    tokens: Int[np.ndarray, "b width"]
    lengths: Int[np.ndarray, "b"]
    end: int


def cut(prompts: Sequence[Sequence[int]], start: int = 0) -> Iterator[PrefillBucket]:
    """Yields the buckets of a batch of prompts, from position ``start`` on.

    All buckets but the last end at multiples of ``LARGEST_BUCKET`` for any ``start``, so that the previews
    of the last buckets cover the same tokens (see ``first_previewed``).
    """
    longest = max(len(prompt) for prompt in prompts)
    while start < longest:
        end = min(longest, (start // LARGEST_BUCKET + 1) * LARGEST_BUCKET)
        width = bucket_widths(end - start)[-1]
        tokens = np.zeros((len(prompts), width), np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            chunk = prompt[start:end]
            tokens[row] = np.resize(chunk, width)
            lengths[row] = len(chunk)
        yield PrefillBucket(tokens, lengths, end)
        start = end


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
        yield _of_one(prompt, start, end, width)
        start = end


def _of_one(prompt: Sequence[int], start: int, end: int, width: int) -> PrefillBucket:
    """Returns the bucket of the tokens ``start..end - 1`` of one prompt."""
    tokens = np.resize(np.asarray(prompt[start:end], np.int32), (1, width))
    return PrefillBucket(tokens, np.array([end - start], np.int32), end)


def bucket_widths(most: int) -> list[int]:
    """Returns the widths of the buckets of up to ``most`` tokens, ascending."""
    widths = [SMALLEST_BUCKET]
    while widths[-1] < most:
        widths.append(2 * widths[-1])
    return widths


def cut_chunks(prompt: Sequence[int], start: int, chunk: int, has_preview: bool) -> Iterator[PrefillBucket]:
    """Cuts a prompt into buckets that end at fixed positions, for an engine that shares prefixes.

    Buckets end at multiples of ``chunk``, as far as prompts share their prefixes, and at the end of the
    preview. The bucket before the end of the preview has its tokens, and all others up to the last multiple:
    each bucket reads all weights, so one for the preview alone would cost half as much as a whole one. So
    every bucket is the same for any ``start``, and the preview is that of ``cut``.

    Args:
      prompt: Tokens of the prompt.
      start: First position to read, a multiple of ``chunk``, and at most ``shareable``.
      chunk: Largest number of tokens of a bucket. Only that of the preview may have more, if chunks are
        smaller than a preview.
      has_preview: Whether the dial uses a preview.
    """
    length = len(prompt)
    shared = shareable(length, chunk, has_preview)
    ends = {*range(start + chunk, shared + 1, chunk), length}
    if has_preview:
        first = first_previewed(length)
        last = min(first + PREVIEW_TOKENS, length)
        ends |= {last} if last - shared <= chunk else {first, last}
    for end in sorted(ends - {start}):
        width = bucket_widths(end - start)[-1]
        yield _of_one(prompt, start, end, width)
        start = end


def shareable(length: int, chunk: int, has_preview: bool) -> int:
    """Returns the number of leading tokens of a prompt that may come from shared pages: whole prefill chunks.

    The tokens of the preview are always read, and so is the last token, for the logits.
    """
    read = first_previewed(length) if has_preview else length - 1
    return read // chunk * chunk


def first_previewed(length: int) -> int:
    """Returns the first position whose tokens must be read for the preview of a prompt of ``length`` tokens.

    The dial uses the preview of the last ``PREVIEW_TOKENS`` tokens of the last bucket, or of the bucket
    before it if the last one has fewer tokens (see ``engine.merge_previews``).
    """
    last_bucket = (length - 1) // LARGEST_BUCKET * LARGEST_BUCKET
    end = last_bucket if last_bucket > 0 and length - last_bucket < PREVIEW_TOKENS else length
    return max(end - PREVIEW_TOKENS, 0)
