"""Prompts cut into buckets: every token once, and the same preview wherever reading starts."""

import functools

import numpy as np
import pytest

from grinqh_jax.decoding import prefill_buckets
from grinqh_jax.decoding.dial import SKIPPED_POSITIONS
from grinqh_jax.decoding.engine.prompt import PREVIEW_TOKENS
from grinqh_jax.decoding.prefill_buckets import (
    CONVERSATION_WIDTHS,
    LARGEST_BUCKET,
    SMALLEST_BUCKET,
    cut,
    cut_chunks,
    cut_conversation,
    first_previewed,
)


def read(prompts, start=0) -> list[list[int]]:
    """Returns the tokens of each row, joined from the buckets."""
    rows = [[] for _ in prompts]
    for bucket in cut(prompts, start):
        for row, tokens, length in zip(rows, bucket.tokens, bucket.lengths, strict=True):
            row += tokens[:length].tolist()
            np.testing.assert_array_equal(tokens[length:], np.resize(tokens[:length], len(tokens) - length))
    return rows


@pytest.mark.parametrize("lengths", [(1,), (32,), (33,), (2048,), (2049, 3, 100), (5000,)])
def test_every_token_is_read_once_in_few_widths(lengths):
    prompts = [np.random.default_rng(n).integers(1, 1000, n).tolist() for n in lengths]
    assert read(prompts) == prompts
    for bucket in cut(prompts):
        width = bucket.tokens.shape[1]
        assert SMALLEST_BUCKET <= width <= LARGEST_BUCKET
        assert width & (width - 1) == 0
        assert width == SMALLEST_BUCKET or bucket.lengths.max() > width // 2


def test_reading_may_start_anywhere():
    prompt = list(range(1, 5001))
    for start in (1, 100, 2047, 2048, 2049, 4999):
        assert read([prompt], start) == [prompt[start:]]
        ends = [bucket.end for bucket in cut([prompt], start)]
        assert ends == [end for end in (2048, 4096, 5000) if end > start]


@pytest.mark.parametrize("length", [1, 64, 65, 300, 577, 2049, 5000])
def test_a_conversation_has_buckets_of_two_widths(length):
    prompt = list(range(1, length + 1))
    for start in {0, first_previewed(length) // 2, first_previewed(length)}:
        buckets = list(cut_conversation(prompt, start))
        chunks = [bucket.tokens[0, : bucket.lengths[0]].tolist() for bucket in buckets]
        assert [token for chunk in chunks for token in chunk] == prompt[start:]
        assert {bucket.tokens.shape[1] for bucket in buckets} <= set(CONVERSATION_WIDTHS)
        assert np.cumsum([start, *map(len, chunks)])[1:].tolist() == [bucket.end for bucket in buckets]
        assert len(buckets) <= 6 + (length - start) // 512


def previewed(length: int, start: int, cut_prompt=None) -> range:
    """Returns the positions of the preview that the dial observes, by the rules of the engine."""
    merged, begin = range(0), start
    cut_prompt = cut_prompt or (lambda prompt, start: cut([prompt], start))
    for bucket in cut_prompt([1] * length, start):
        later = range(max(bucket.end - PREVIEW_TOKENS, SKIPPED_POSITIONS, begin), bucket.end)
        merged = later if len(later) >= len(merged) else merged
        begin = bucket.end
    return merged


def test_the_preview_does_not_depend_on_where_reading_starts(monkeypatch):
    monkeypatch.setattr(prefill_buckets, "LARGEST_BUCKET", 128)
    for length in range(1, 400):
        latest = first_previewed(length)
        assert 0 <= latest < length
        for start in {0, latest // 3, latest // 2, latest - 1, latest} - {-1}:
            assert previewed(length, start) == previewed(length, 0), (length, start)
            assert previewed(length, start, cut_conversation) == previewed(length, 0), (length, start)
        if length > PREVIEW_TOKENS + SKIPPED_POSITIONS:  # A later start changes the preview.
            assert previewed(length, latest + 1) != previewed(length, 0)


@pytest.mark.parametrize("chunk", [32, 128])
def test_prefill_chunks_are_the_same_from_any_start_and_have_the_preview_of_the_whole_prompt(chunk):
    for length in (1, 31, 64, 65, 97, 128, 129, 191, 192, 193, 300, 2048, 2060, 2112, 2200):
        prompt, preview = list(range(length)), first_previewed(length)
        every = list(cut_chunks(prompt, 0, chunk, True))
        assert [token for b in every for token in b.tokens[0, : b.lengths[0]]] == prompt
        assert all(b.lengths[0] <= max(chunk, PREVIEW_TOKENS) for b in every)
        for start in range(0, preview + 1, chunk):
            later = [b for b in every if b.end > start]
            some = list(cut_chunks(prompt, start, chunk, True))
            assert [b.end for b in some] == [b.end for b in later]
            assert all((b.tokens == c.tokens).all() for b, c in zip(some, later, strict=True))
            cut_prompt = functools.partial(cut_chunks, chunk=chunk, has_preview=True)
            assert previewed(length, start, cut_prompt) == previewed(length, 0)
        assert all(b.end % chunk == 0 or b.end == length for b in cut_chunks(prompt, 0, chunk, False))


def test_the_preview_takes_no_prefill_chunk_of_its_own():
    """A prefill chunk reads all weights, however few tokens it has."""
    for length in range(1, 2049):
        graded, dense = (len(list(cut_chunks([1] * length, 0, 512, preview))) for preview in (True, False))
        assert graded == dense == -(-length // 512)
