"""The attention kernel on a GPU against XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import attention
from grinqh_jax.model.cache import KeyValues
from pallas_kernels import Activations, decode_attention

pytestmark = pytest.mark.gpu

SHAPES = ("Qwen3-0.6B", "Qwen3-8B", "Qwen3-14B", "Llama-3.2-1B", "Qwen3-30B-A3B")
PAGE_SIZE = 64
CAPACITY = 2048


def inputs(config, batch: int, seed: int = 0):
    """Random heads of new tokens, norm scales, and a contiguous cache."""
    all_heads = config.num_heads + 2 * config.num_kv_heads
    keys = [jax.random.fold_in(jax.random.key(i), seed) for i in range(5)]
    cache = KeyValues(
        *(
            jax.random.normal(k, (batch, CAPACITY, config.num_kv_heads, config.head_dim), jnp.bfloat16)
            for k in keys[:2]
        )
    )
    qkv = jax.random.normal(keys[2], (batch, 1, all_heads * config.head_dim), jnp.bfloat16)
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


def step(config, qkv, norms, positions, cache):
    """Attention of one decode step: outputs, and the cache as contiguous rows."""
    spec = config.layers[0].attention
    norms = norms if spec.head_norms else None

    # A new function is traced again, and calls the `supports` that a test has patched.
    @jax.jit
    def run(qkv, norms, positions, cache):
        outputs, cache = attention.attend_heads(config, spec, Activations.of(qkv), norms, positions, cache)
        return outputs.array, cache.contiguous(jnp.full(len(positions), CAPACITY))[:2]

    results = run(qkv, norms, jnp.asarray(positions, jnp.int32)[:, None], cache)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), results)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("lengths", [(0,), (5,), (130, 1), (1000, 2047, 3), (2048,)])
@pytest.mark.parametrize("paged", [False, True])
def test_agrees_with_xla(monkeypatch, name, lengths, paged):
    config = random_model.shape(name)
    qkv, norms, cache = inputs(config, len(lengths))
    if paged:
        cache = in_pages(cache, np.random.default_rng(len(lengths)))
    outputs, cached = step(config, qkv, norms, lengths, cache)
    np.testing.assert_array_equal(step(config, qkv, norms, lengths, cache)[0], outputs)
    monkeypatch.setattr(decode_attention, "supports", lambda **sizes: "switched off")
    expected, expected_cached = step(config, qkv, norms, lengths, cache)
    # With a full cache, XLA's operations ignore the new token, and the kernel does not.
    fits = np.array(lengths) < CAPACITY
    error = np.linalg.norm((outputs - expected)[fits]) / max(np.linalg.norm(expected[fits]), 1e-9)
    assert error < 1e-2
    # Keys are rounded to bfloat16 before the rotation. If the two computations round differently, a rotated
    # value may be off by a 256th of the larger of the two values that it comes from.
    np.testing.assert_allclose(cached[0], expected_cached[0], rtol=2**-7, atol=2**-7 * 5)
    assert np.mean(cached[0] == expected_cached[0]) > 1 - 1e-3
    np.testing.assert_array_equal(cached[1], expected_cached[1])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", [2, 5, 16])
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
