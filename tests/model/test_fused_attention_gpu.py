"""Attention of a prompt's chunks by cuDNN on a GPU, against float64 (``pytest -m gpu``)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.model import attention
from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.ring_cache import RingKeyValues, ring_slots

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS = 8, 2
PAGE_SIZE = 16


SINKS = np.linspace(-2, 6, HEADS, dtype=np.float32)
"""From a thousandth of the weights to nearly all of them."""


@functools.cache
def program(window=None, sinks=False):
    """``attention.attend`` as a jitted function. Tests share it, so that sizes compile once."""
    options = {"window": window, "sinks": jnp.asarray(SINKS) if sinks else None}
    return jax.jit(functools.partial(attention.attend, **options))


def heads(tokens: int, head_dim: int = 128, batch: int = 1, seed: int = 0):
    """Queries, keys and values of all tokens of random texts."""
    keys = jax.random.split(jax.random.key(seed), 3)
    counts = HEADS, KV_HEADS, KV_HEADS
    shapes = ((batch, tokens, count, head_dim) for count in counts)
    return [jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)]


def chunk(text, cache, start: int, stop: int):
    """Arguments of ``attend`` for the tokens of a chunk."""
    positions = jnp.broadcast_to(jnp.arange(start, stop), (len(text[0]), stop - start))
    return *(array[:, start:stop] for array in text), positions, cache


def empty_cache(batch: int, capacity: int, head_dim: int = 128) -> KeyValues:
    """A contiguous cache, full of what is not finite."""
    empty = jnp.full((batch, capacity, KV_HEADS, head_dim), jnp.nan, jnp.bfloat16)
    return KeyValues(empty, empty)


def empty_pages(capacity: int, seed: int = 0) -> KeyValues:
    """Pages of a row at random places, full of what is not finite."""
    count = capacity // PAGE_SIZE
    places = np.random.default_rng(seed).permutation(count + 5)[:count]
    empty = jnp.full((count + 5, PAGE_SIZE, KV_HEADS, 128), jnp.nan, jnp.bfloat16)
    return KeyValues(empty, empty, jnp.asarray(places[None], jnp.int32))


def exact(text, start: int, stop: int, window: int | None = None, sinks: bool = False) -> np.ndarray:
    """Attention of the tokens of a chunk in float64."""
    queries, keys, values = (np.asarray(array, np.float64) for array in text)
    keys, values = (np.repeat(array, HEADS // KV_HEADS, axis=2) for array in (keys, values))
    scores = np.einsum("bthd,bshd->bhts", queries[:, start:stop], keys) / np.sqrt(queries.shape[-1])
    distance = np.arange(start, stop)[:, None] - np.arange(keys.shape[1])
    visible = (distance >= 0) & (distance < (window or keys.shape[1]))
    weights = np.exp(np.where(visible, scores, -np.inf))
    total = weights.sum(-1, keepdims=True) + (np.exp(np.float64(SINKS))[:, None, None] if sinks else 0)
    return np.einsum("bhts,bshd->bthd", weights / total, values)


def assert_close(outputs, expected):
    difference = np.linalg.norm(np.asarray(outputs, np.float64) - expected)
    assert difference < 4e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("tokens", "capacity"), [(17, 61), (32, 300), (512, 1024)])
def test_chunks_match_float64(head_dim, tokens, capacity):
    """Two rows in two chunks. The second one ends before the cache does, except with 512 tokens."""
    text, cache = heads(2 * tokens, head_dim, batch=2), empty_cache(2, capacity, head_dim)
    arguments = chunk(text, cache, 0, tokens)
    assert "fmha" in program().lower(*arguments).as_text()
    for start in (0, tokens):
        outputs, cache = program()(*chunk(text, cache, start, start + tokens))
        assert_close(outputs, exact(text, start, start + tokens))


def test_rows_of_different_lengths_match_float64():
    text, cache = heads(128, batch=2), empty_cache(2, 256)
    _, cache = program()(*chunk(text, cache, 0, 64))
    queries, keys, values, positions, cache = chunk(text, cache, 64, 128)
    positions = positions.at[1].add(-64)  # The second row reads its chunk at its beginning.
    outputs, _ = program()(queries, keys, values, positions, cache)
    assert_close(outputs[:1], exact([array[:1] for array in text], 64, 128))
    assert_close(outputs[1:], exact([array[1:, 64:] for array in text], 0, 64))


@pytest.mark.parametrize("window", [30, 100])
def test_windows_match_float64(window):
    text, slots = heads(192), ring_slots(window)
    cache, ring = empty_pages(256), RingKeyValues.zeros(1, slots, KV_HEADS, 128, jnp.bfloat16)
    for start in (0, 64, 128):
        expected = exact(text, start, start + 64, window)
        outputs, cache = program(window)(*chunk(text, cache, start, start + 64))
        assert_close(outputs, expected)
        outputs, ring = program(window)(*chunk(text, ring, start, start + 64))
        assert_close(outputs, expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_sinks_match_float64(head_dim):
    """Two rows in two chunks, in a cache with slots behind the end."""
    text, cache = heads(192, head_dim, batch=2), empty_cache(2, 300, head_dim)
    arguments = chunk(text, cache, 0, 96)
    assert "fmha" in program(sinks=True).lower(*arguments).as_text()
    for start in (0, 96):
        outputs, cache = program(sinks=True)(*chunk(text, cache, start, start + 96))
        assert_close(outputs, exact(text, start, start + 96, sinks=True))


def test_sinks_and_a_window_match_float64():
    text, ring = heads(192), RingKeyValues.zeros(1, ring_slots(100), KV_HEADS, 128, jnp.bfloat16)
    for start in (0, 64, 128):
        outputs, ring = program(100, sinks=True)(*chunk(text, ring, start, start + 64))
        assert_close(outputs, exact(text, start, start + 64, 100, sinks=True))


@pytest.mark.parametrize("sinks", [False, True])
def test_bits_depend_neither_on_capacity_nor_on_pages_nor_on_other_rows(sinks):
    text, attend = heads(1024), program(sinks=sinks)

    def second_half(cache, text=text):
        _, cache = attend(*chunk(text, cache, 0, 512))
        return np.asarray(attend(*chunk(text, cache, 512, 1024))[0])

    expected = second_half(empty_cache(1, 1024))
    for other in (empty_cache(1, 1100), empty_cache(1, 4096), empty_pages(1024), empty_pages(2048, seed=1)):
        np.testing.assert_array_equal(second_half(other), expected)
    two = [jnp.concatenate(both) for both in zip(text, heads(1024, seed=1), strict=True)]
    np.testing.assert_array_equal(second_half(empty_cache(2, 2048), two)[:1], expected)


@pytest.mark.parametrize("sinks", [False, True])
def test_bits_of_a_token_do_not_depend_on_its_chunk(sinks):
    """A prompt whose prefix is reused begins in the middle, and a short chunk has a bucket of its own."""
    text, cache, attend = heads(1024), empty_cache(1, 1024), program(sinks=sinks)
    expected, _ = attend(*chunk(text, cache, 0, 1024))
    for width in (32, 64, 128, 256, 512):
        outputs, cache = [], empty_cache(1, 1024)
        for start in range(0, 1024, width):
            part, cache = attend(*chunk(text, cache, start, start + width))
            outputs.append(part)
        np.testing.assert_array_equal(np.concatenate(outputs, axis=1), expected)
