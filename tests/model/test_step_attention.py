"""Attention of a decode step on a CPU, against numpy in float64 and without the positions nobody sees."""

import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.model import step_attention
from grinqh_jax.model.attention import attend
from grinqh_jax.model.cache import KeyValues

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def by_hand(query, keys, values, window, soft_cap, sinks):
    """Attends from ``[heads, d]`` to ``[s, kv_heads, d]``, the last position being the query's."""
    first = 0 if window is None else max(len(keys) - window, 0)
    outputs = []
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        scores = keys[first:, kv_head] @ query[head] / HEAD_DIM**0.5
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[head] - scores.max()))
        outputs.append(weights / total @ values[first:, kv_head])
    return np.array(outputs)


@pytest.mark.parametrize("page_size", [None, 4, 16, 64])
@pytest.mark.parametrize(
    ("window", "soft_cap", "sinks"),
    [(None, None, None), (9, None, None), (40, 2.0, None), (20, None, [-9.0, 0.5, 2.0, 9.0])],
)
def test_a_step_is_the_softmax_by_hand(monkeypatch, page_size, window, soft_cap, sinks):
    monkeypatch.setattr(step_attention, "BLOCK", 16)
    capacity = 75 if page_size is None else 192  # 75 is no multiple of the block.
    positions = np.array([0, 15, 16, 37, 74, capacity])  # The last row is idle.
    rng = np.random.default_rng(0)
    query = rng.standard_normal((6, 1, HEADS, HEAD_DIM))
    key, value = rng.standard_normal((2, 6, 1, KV_HEADS, HEAD_DIM))
    keys, values = rng.standard_normal((2, 6, capacity, KV_HEADS, HEAD_DIM))
    for row, position in enumerate(positions):
        keys[row, position:] = values[row, position:] = np.nan
    pages = None
    if page_size is not None:
        each = capacity // page_size
        pages = rng.permutation(6 * each).reshape(6, each).astype(np.int32)
        pools = np.full((2, 6 * each, page_size, KV_HEADS, HEAD_DIM), np.nan)
        pools[:, pages] = np.stack([keys, values]).reshape(2, 6, each, page_size, KV_HEADS, HEAD_DIM)
        pages[np.arange(each) > (positions // page_size)[:, None]] = 6 * each  # pages that a row lacks
        stored = pools
    else:
        stored = np.stack([keys, values])
    cache = KeyValues(*jnp.asarray(stored, jnp.float32), None if pages is None else jnp.asarray(pages))
    new = [jnp.asarray(array, jnp.float32) for array in (query, key, value)]
    of_heads = None if sinks is None else jnp.asarray(sinks, jnp.float32)
    outputs, _ = attend(*new, jnp.asarray(positions)[:, None], cache, window, soft_cap, of_heads)
    for row, position in enumerate(positions[:-1]):
        seen = [
            np.concatenate([old[row, :position], now[row]]) for old, now in ((keys, key), (values, value))
        ]
        expected = by_hand(query[row, 0], *seen, window, soft_cap, sinks)
        np.testing.assert_allclose(outputs[row, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(outputs[-1], 0)
