"""The gated delta net against its recurrence in float64, token by token, with padding and in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.model.delta_net import DeltaNet
from grinqh_jax.model.fixed_states import RecurrentState
from grinqh_jax.model.layer_spec import DeltaHeads
from pallas_kernels import Activations

HEADS = DeltaHeads(key_heads=2, value_heads=4, key_dim=8, value_dim=6, convolution_width=4)
EPS = 1e-6


def parameters(seed: int = 0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((HEADS.channels, 1, HEADS.convolution_width)),
        rng.standard_normal(HEADS.value_heads) - 1,
        rng.standard_normal(HEADS.value_heads),
        1 + 0.3 * rng.standard_normal(HEADS.value_dim),
    )


def inputs(batch: int, tokens: int) -> np.ndarray:
    width = HEADS.channels + HEADS.value_heads * (HEADS.value_dim + 2)
    return np.random.default_rng(1).standard_normal((batch, tokens, width))


def recurrence(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns results and memory of one row ``[t, n]`` in float64, computed for each token and head."""
    filters, log_decay, step_bias, scale = parameters()
    sizes = HEADS.channels, HEADS.value_heads * HEADS.value_dim, HEADS.value_heads
    qkv, gate, beta, step = np.split(x, np.cumsum(sizes), axis=-1)
    width = HEADS.convolution_width
    padded = np.concatenate([np.zeros((width - 1, HEADS.channels)), qkv])
    mixed = np.stack([np.sum(padded[i : i + width].T * filters[:, 0], axis=-1) for i in range(len(x))])
    mixed = mixed / (1 + np.exp(-mixed))
    keys = HEADS.key_heads * HEADS.key_dim
    memory = np.zeros((HEADS.value_heads, HEADS.key_dim, HEADS.value_dim))
    results = np.empty((len(x), HEADS.value_heads, HEADS.value_dim))
    for t in range(len(x)):
        for h in range(HEADS.value_heads):
            head = h // (HEADS.value_heads // HEADS.key_heads)
            q = mixed[t, :keys].reshape(HEADS.key_heads, -1)[head]
            k = mixed[t, keys : 2 * keys].reshape(HEADS.key_heads, -1)[head]
            v = mixed[t, 2 * keys :].reshape(HEADS.value_heads, -1)[h]
            q, k = (a / np.sqrt(np.sum(a**2) + 1e-6) for a in (q, k))
            decay = np.exp(-np.exp(log_decay[h]) * np.log1p(np.exp(step[t, h] + step_bias[h])))
            share = 1 / (1 + np.exp(-beta[t, h]))
            memory[h] *= decay
            memory[h] += np.outer(k, share * (v - k @ memory[h]))
            o = q @ memory[h] * HEADS.key_dim**-0.5
            o = o / np.sqrt(np.mean(o**2) + EPS) * scale
            z = gate[t].reshape(HEADS.value_heads, -1)[h]
            results[t, h] = o * z / (1 + np.exp(-z))
    return results.reshape(len(x), -1), memory


def run(x: np.ndarray, state: RecurrentState | None = None) -> tuple[np.ndarray, RecurrentState]:
    mixed, state = layer([np.float32(a) for a in parameters()], np.float32(x), state)
    return np.asarray(mixed), state


@jax.jit
def layer(parameters, x, state):
    *arrays, scale = parameters
    mixed, state = DeltaNet(*arrays)(HEADS, Activations.of(x), scale, EPS, state)
    return mixed.array, state


@pytest.mark.parametrize("tokens", [1, 5, 64, 150])
def test_whole_sequences_follow_the_recurrence(tokens):
    x = inputs(2, tokens)
    mixed, state = run(x)
    for row in range(2):
        expected, memory = recurrence(x[row])
        np.testing.assert_allclose(mixed[row], expected, atol=2e-5)
        np.testing.assert_allclose(state.memory[row], memory, atol=2e-5)


def test_pieces_with_padding_and_single_tokens_continue_each_row():
    """Rows of 70 and 3 tokens in a piece of 80; then one token each; then one for the first row only."""
    x, lengths, rng = inputs(2, 80), np.array([70, 3]), np.random.default_rng(3)
    rows = [x[0, :72], x[1, :4]]
    piece = x.copy()
    for row, length in enumerate(lengths):
        piece[row, length:] = rng.standard_normal(piece[row, length:].shape)
    zeros = RecurrentState.zeros(HEADS, 2)
    mixed, state = run(piece, zeros._replace(counts=jnp.asarray(lengths)))
    results = [mixed[row, :length] for row, length in enumerate(lengths)]
    for counts in ([1, 1], [1, 0]):
        token = np.stack([x[row, [lengths[row]]] for row in range(2)])
        mixed, state = run(token, state._replace(counts=jnp.asarray(counts)))
        results = [
            np.concatenate([result, new]) if count else result
            for result, new, count in zip(results, mixed, counts, strict=True)
        ]
        lengths = lengths + counts
    for row, result in enumerate(results):
        expected, memory = recurrence(rows[row])
        np.testing.assert_allclose(result, expected, atol=2e-5)
        np.testing.assert_allclose(state.memory[row], memory, atol=2e-5)
