"""Causal attention block by block, compared with float64 and with JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.model import causal_attention
from grinqh_jax.model.causal_attention import blockwise


def heads(tokens, *, batch=2, query_heads=6, kv_heads=2, head_dim=8):
    rng = np.random.default_rng(tokens)
    shapes = [(batch, tokens, count, head_dim) for count in (query_heads, kv_heads, kv_heads)]
    positions = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    return (*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes), positions)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 20])
def test_blocks_match_float64(monkeypatch, tokens, window):
    monkeypatch.setattr(causal_attention, "QUERY_BLOCK", 8)
    queries, keys, values, positions = heads(tokens)
    q, k, v = (np.asarray(array, np.float64) for array in (queries, keys, values))
    expected = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        visible = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        scores = k[b, visible, h // 3] @ q[b, t, h] / np.sqrt(8)
        weights = np.exp(scores - scores.max())
        expected[b, t, h] = weights / weights.sum() @ v[b, visible, h // 3]
    actual = jax.jit(blockwise, static_argnums=4)(queries, keys, values, positions, window)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def total_gradients(attend, arrays):
    return jax.jit(jax.grad(lambda arrays: jnp.sum(jnp.sin(attend(*arrays)))))(arrays)


def test_gradients_match_those_of_jax(monkeypatch):
    monkeypatch.setattr(causal_attention, "QUERY_BLOCK", 8)
    *arrays, positions = heads(20)
    expected = total_gradients(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), arrays)
    gradients = total_gradients(lambda *a: blockwise(*a, positions), arrays)
    for actual, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_a_sink_is_a_key_without_a_value(monkeypatch):
    """A first key, which every query sees, has the sink as its score and zeros as its value."""
    monkeypatch.setattr(causal_attention, "QUERY_BLOCK", 8)
    *arrays, positions = heads(20, query_heads=2)
    sinks = jnp.asarray([-1.0, 2.0])

    def with_first_key(queries, keys, values):
        scores = jnp.einsum("bthd,bshd->bhts", queries, keys) * 8**-0.5
        scores = jnp.where(jnp.tri(20, dtype=bool), scores, -jnp.inf)
        first = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([first, scores], axis=-1), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights[..., 1:], values)

    def ours(*arrays):
        return blockwise(*arrays, positions, sinks=sinks)

    actual, wanted = (jax.jit(attend)(*arrays) for attend in (ours, with_first_key))
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
    expected = total_gradients(with_first_key, arrays)
    for actual, wanted in zip(total_gradients(ours, arrays), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
