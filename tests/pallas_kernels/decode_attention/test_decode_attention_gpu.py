"""The attention kernel on a GPU against XLA's operations."""

import contextlib
import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import attention
from grinqh_jax.model.cache import KeyValues
from pallas_kernels import Activations, decode_attention
from pallas_kernels.decode_attention import kernel
from pallas_kernels.decode_attention.lane_context import SplitConfig

pytestmark = pytest.mark.gpu

SHAPES = ["Qwen3-8B", "Llama-3.2-1B", *slow("Qwen3-0.6B", "Qwen3-14B", "Qwen3-30B-A3B")]
PAGE_SIZE = 64
CAPACITY = 2048


def inputs(config, batch: int, seed: int = 0, tokens: int = 1):
    """Random heads of new tokens, norm scales, and a contiguous cache."""
    all_heads = config.num_heads + 2 * config.num_kv_heads
    keys = [jax.random.fold_in(jax.random.key(i), seed) for i in range(5)]
    cache = KeyValues(
        *(
            jax.random.normal(k, (batch, CAPACITY, config.num_kv_heads, config.head_dim), jnp.bfloat16)
            for k in keys[:2]
        )
    )
    qkv = jax.random.normal(keys[2], (batch, tokens, all_heads * config.head_dim), jnp.bfloat16)
    norms = tuple(1 + 0.2 * jax.random.normal(k, (config.head_dim,), jnp.bfloat16) for k in keys[3:])
    return qkv, norms, cache


def in_pages(cache: KeyValues, rng, extra: int = 3) -> KeyValues:
    """The same cache in pages at random places, among pages of huge numbers."""
    batch, capacity, *head = cache.keys.shape
    count = batch * capacity // PAGE_SIZE
    places = rng.permutation(count + extra)[:count]

    def pool(array):
        pages = np.full((count + extra, PAGE_SIZE, *head), 1e30, array.dtype)
        pages[places] = np.asarray(array).reshape(count, PAGE_SIZE, *head)
        return jnp.asarray(pages)

    table = jnp.asarray(places.reshape(batch, -1), jnp.int32)
    return KeyValues(pool(cache.keys), pool(cache.values), table)


@functools.cache
def program(config, spec, by_kernel: bool):
    """Attention of a decode step as a jitted function. Tests share it, so that sizes compile once."""

    def run(qkv, norms, positions, cache):
        outputs, cache = attention.attend_heads(config, spec, Activations.of(qkv), norms, positions, cache)
        return outputs.array, cache.contiguous(jnp.full(len(positions), CAPACITY))[:2]

    return jax.jit(run)


def step(config, qkv, norms, positions, cache, by_kernel: bool = True, **options):
    """Attention of one decode step: outputs, and the cache as contiguous rows."""
    spec = dataclasses.replace(config.layers[0].attention, **options)
    norms, tokens = norms if spec.head_norms else None, qkv.shape[1]
    positions = jnp.asarray(positions, jnp.int32)[:, None] + jnp.arange(tokens)
    refusal = contextlib.nullcontext()
    if not by_kernel:  # The first call of a program traces it, and asks whether the kernel runs.
        refusal = mock.patch.object(decode_attention, "supports", return_value="switched off")
    with refusal:
        results = program(config, spec, by_kernel)(qkv, norms, positions, cache)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), results)


LENGTHS = [(0,), (5,), (2048,), (130, 1, 0), (1000, 2047, 3)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("paged", [False, True])
def test_agrees_with_xla(name, paged):
    config = random_model.shape(name)
    for lengths in LENGTHS:
        qkv, norms, cache = inputs(config, len(lengths))
        if paged:
            cache = in_pages(cache, np.random.default_rng(len(lengths)))
        outputs, cached = step(config, qkv, norms, lengths, cache)
        np.testing.assert_array_equal(step(config, qkv, norms, lengths, cache)[0], outputs, str(lengths))
        expected, expected_cached = step(config, qkv, norms, lengths, cache, by_kernel=False)
        # With a full cache, XLA's operations ignore the new token, and the kernel does not.
        fits = np.array(lengths) < CAPACITY
        error = np.linalg.norm((outputs - expected)[fits]) / max(np.linalg.norm(expected[fits]), 1e-9)
        assert error < 1e-2, lengths
        # Keys are rounded to bfloat16 before the rotation. If the two computations round differently, a
        # rotated value may be off by a 256th of the larger of the two values that it comes from.
        np.testing.assert_allclose(cached[0], expected_cached[0], 2**-7, 2**-7 * 5, err_msg=str(lengths))
        assert np.mean(cached[0] == expected_cached[0]) > 1 - 1e-3, lengths
        np.testing.assert_array_equal(cached[1], expected_cached[1], str(lengths))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", [16, *slow(2, 5)])
def test_paged_outputs_depend_bitwise_on_the_row_alone(name, batch):
    """Neither the other rows nor the places of the pages change a row."""
    config, rng = random_model.shape(name), np.random.default_rng(batch)
    qkv, norms, cache = inputs(config, batch)
    lengths = rng.integers(0, CAPACITY, batch)
    together, _ = step(config, qkv, norms, lengths, in_pages(cache, rng))
    for row in {0, batch // 2, batch - 1}:
        one = slice(row, row + 1)
        alone = in_pages(KeyValues(cache.keys[one], cache.values[one]), rng)
        outputs, _ = step(config, qkv[one], norms, lengths[one], alone)
        np.testing.assert_array_equal(outputs[0], together[row])


@pytest.mark.parametrize("batch", [4, *slow(16)])
def test_the_order_of_shares_changes_no_bit(monkeypatch, batch):
    """Caches from ``same_share_capacity`` on have another order than shorter ones."""
    config = random_model.shape("Qwen3-8B")
    qkv, norms, cache = inputs(config, batch)
    lengths = np.random.default_rng(batch).integers(0, CAPACITY, batch)
    results = []
    for least in (CAPACITY, CAPACITY + 1):
        monkeypatch.setattr(kernel, "SPLIT_CONFIG", SplitConfig(same_share_capacity=least))
        program.cache_clear()  # The configuration is read while a program is traced.
        results.append(step(config, qkv, norms, lengths, cache))
    program.cache_clear()
    jax.tree.map(np.testing.assert_array_equal, *results)


OPTIONS: list[dict] = [
    {},
    {"window": 300},
    {"score_soft_cap": 20.0},
    {"window": 1000, "score_scale": 0.05},
]
QUICK = [
    (64, OPTIONS[1], 5, 8),
    (80, OPTIONS[2], 2, 32),
    (96, OPTIONS[3], 16, 8),
    (128, OPTIONS[0], 16, 32),
    (128, OPTIONS[3], 2, 32),
    (256, OPTIONS[1], 1, 8),
]
"""Every value of every parameter at least once."""

ALL = itertools.product(kernel.HEAD_DIMS, OPTIONS, (1, 2, 5, 16), (8, 32))


@pytest.mark.parametrize(
    ("head_dim", "options", "tokens", "heads"),
    QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK],
    ids=str,
)
def test_several_tokens_agree_with_xla(head_dim, options, tokens, heads):
    """Outputs agree with XLA, and have the bits of the same tokens one after another, in pages too."""
    config = dataclasses.replace(
        random_model.shape("Qwen3-0.6B"), head_dim=head_dim, num_heads=heads, num_kv_heads=4
    )
    lengths, rng = (0, 37, 1500, CAPACITY - tokens), np.random.default_rng(tokens)
    qkv, norms, cache = inputs(config, len(lengths), tokens=tokens)
    outputs, cached = step(config, qkv, norms, lengths, cache, **options)
    pages = in_pages(cache, rng)
    np.testing.assert_array_equal(step(config, qkv, norms, lengths, pages, **options)[0], outputs)
    one_cache = cache
    for t in range(tokens):
        now = [length + t for length in lengths]
        one, rows = step(config, qkv[:, t : t + 1], norms, now, one_cache, **options)
        np.testing.assert_array_equal(one[:, 0], outputs[:, t])
        one_cache = KeyValues(*(jnp.asarray(a, jnp.bfloat16) for a in rows))
    for row in (0, 2):
        alone = slice(row, row + 1)
        mine = KeyValues(cache.keys[alone], cache.values[alone])
        one, _ = step(config, qkv[alone], norms, lengths[alone], mine, **options)
        np.testing.assert_array_equal(one[0], outputs[row])
    expected, expected_cached = step(config, qkv, norms, lengths, cache, by_kernel=False, **options)
    assert np.linalg.norm(outputs - expected) < 1e-2 * np.linalg.norm(expected)
    for row, length in enumerate(lengths):  # XLA clears the slots after the new tokens.
        used = [np.stack(both)[:, row, : length + tokens] for both in (cached, expected_cached)]
        np.testing.assert_allclose(*used, rtol=2**-7, atol=2**-7 * 5)


def test_sinks_and_a_long_context():
    """A sink equals one more position with that score and a value of zero."""
    config, length, tokens = random_model.shape("Qwen3-0.6B"), 131_000, 4
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    keys = jax.random.split(jax.random.key(0), 3)
    cache = [jax.random.normal(k, (1, 131_072, kv_heads, dim), jnp.bfloat16) for k in keys[:2]]
    qkv = jax.random.normal(keys[2], (1, tokens, (heads + 2 * kv_heads) * dim), jnp.bfloat16)
    angles = jnp.ones((1, tokens, dim // 2)), jnp.zeros((1, tokens, dim // 2))
    sinks = jnp.linspace(0.0, 12.0, heads)
    attend = jax.jit(
        lambda qkv, keys, values, sinks: (
            decode_attention.decode_attention(
                Activations.of(qkv), *angles, None, 1e-6, keys, values, jnp.full(1, length), sinks=sinks
            )[0].array
        )
    )
    plain, with_sinks = (np.asarray(attend(qkv, *cache, s), np.float64) for s in (None, sinks))
    queries, new_keys, _ = np.split(
        np.asarray(qkv, np.float64).reshape(tokens, -1, dim), [heads, heads + kv_heads], axis=1
    )
    all_keys = np.asarray(cache[0][0], np.float64)
    all_keys[length : length + tokens] = new_keys
    for t, h in [(0, 0), (1, 5), (3, heads - 1)]:
        scores = all_keys[: length + t + 1, h * kv_heads // heads] @ queries[t, h] / dim**0.5
        share = 1 / (1 + np.exp(float(sinks[h]) - scores.max()) / np.exp(scores - scores.max()).sum())
        one = slice(h * dim, (h + 1) * dim)
        np.testing.assert_allclose(
            with_sinks[0, t, one], plain[0, t, one] * share, atol=2e-2 * np.abs(plain).max()
        )
