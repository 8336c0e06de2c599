"""The attention kernel on a GPU against XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import attention
from pallas_kernels import Activations, decode_attention

pytestmark = pytest.mark.gpu

SHAPES = ("Qwen3-0.6B", "Qwen3-8B", "Qwen3-14B", "Llama-3.2-1B")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("lengths", [(0,), (5,), (130, 1), (1000, 2047, 3), (2048,)])
def test_agrees_with_xla(monkeypatch, name, lengths):
    config = random_model.shape(name)
    batch, capacity = len(lengths), 2048
    all_heads = config.num_heads + 2 * config.num_kv_heads
    keys = [jax.random.key(i) for i in range(5)]
    cache = tuple(
        jax.random.normal(k, (batch, capacity, config.num_kv_heads, config.head_dim), jnp.bfloat16)
        for k in keys[:2]
    )
    qkv = jax.random.normal(keys[2], (batch, 1, all_heads * config.head_dim), jnp.bfloat16)
    norms = tuple(1 + 0.2 * jax.random.normal(k, (config.head_dim,), jnp.bfloat16) for k in keys[3:])
    positions = jnp.array(lengths, jnp.int32)[:, None]

    def step(qkv, norms, positions, cache):
        spec = config.layers[0].attention
        norms = norms if spec.head_norms else None
        outputs, cache = attention.attend_heads(config, spec, Activations.of(qkv), norms, positions, cache)
        return outputs.array, cache

    def run():
        # A new function is traced again, and calls the `supports` that is patched below.
        results = jax.jit(lambda *args: step(*args))(qkv, norms, positions, cache)
        return jax.tree.map(lambda a: np.asarray(a, np.float32), results)

    outputs, cached = run()
    np.testing.assert_array_equal(run()[0], outputs)
    monkeypatch.setattr(decode_attention, "supports", lambda **sizes: "switched off")
    expected, expected_cached = run()
    # With a full cache, XLA's operations ignore the new token, and the kernel does not.
    fits = np.array(lengths) < capacity
    error = np.linalg.norm((outputs - expected)[fits]) / max(np.linalg.norm(expected[fits]), 1e-9)
    assert error < 1e-2
    # Keys are rounded to bfloat16 before the rotation. If the two computations round differently, a rotated
    # value may be off by a 256th of the larger of the two values that it comes from.
    np.testing.assert_allclose(cached[0], expected_cached[0], rtol=2**-7, atol=2**-7 * 5)
    assert np.mean(cached[0] == expected_cached[0]) > 1 - 1e-3
    np.testing.assert_array_equal(cached[1], expected_cached[1])
