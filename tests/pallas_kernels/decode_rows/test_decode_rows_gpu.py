"""The kernels between two products on a GPU, against XLA's operations and in a decode step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.gated_mlp import gated
from grinqh_jax.model.norm import add_norm, rms_norm
from pallas_kernels import Activations, decode_rows

pytestmark = pytest.mark.gpu

SIZES = [(1, 4096, 48), (8, 4096, 16), (3, 1024, 4), (1, 12288, 16), (2, 14336, 7)]


def partial_sums(key, shape) -> Activations:
    return Activations.sums(jax.random.normal(key, shape), shape[-1]).astype(jnp.bfloat16)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_xla(size):
    rows, features, count = size
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (rows, 1, features), jnp.bfloat16)
    norm_scale = 1 + 0.1 * jax.random.normal(keys[1], (features,), jnp.bfloat16)
    update = partial_sums(keys[2], (count, rows, 1, features))
    total, normed = jax.jit(add_norm, static_argnums=3)(x, update, norm_scale, 1e-6)
    expected = x.astype(jnp.float32) + update.astype(jnp.float32).array
    np.testing.assert_allclose(total.astype(np.float32), expected, rtol=2**-7, atol=1e-5)
    expected = rms_norm(total.astype(jnp.float32), norm_scale, 1e-6)
    np.testing.assert_allclose(normed.values * normed.factor(), expected, rtol=2**-7, atol=1e-5)
    gate_up = partial_sums(keys[3], (count, rows, 1, 2 * features))
    activated = jax.jit(gated)(gate_up)
    expected = gated(gate_up.astype(jnp.float32)).array
    np.testing.assert_allclose(activated.values.astype(np.float32), expected, rtol=2**-7, atol=1e-4)


def test_tokens_of_a_sequence_have_the_bits_of_single_ones():
    texts, positions, features = 2, 7, 4096
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (texts, positions, features), jnp.bfloat16)
    scale = jnp.ones(features, jnp.bfloat16)
    update = partial_sums(keys[1], (16, texts, positions, features))
    gate_up = partial_sums(keys[2], (16, texts, positions, 2 * features))

    @jax.jit
    def both(x, update, gate_up):
        total, normed = add_norm(x, update, scale, 1e-6)
        return total, normed.array, gated(gate_up).array

    together = both(x, update, gate_up)
    for i in range(positions):
        alone = both(
            x[:, i : i + 1],
            *(
                Activations.sums(sums.partials[:, :, i : i + 1], sums.features).astype(jnp.bfloat16)
                for sums in (update, gate_up)
            ),
        )
        for one, all_of_them in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[:, 0], all_of_them[:, i])


QUICK = [("Qwen3-0.6B", 2, 1), ("Llama-3.2-1B", 2, 3)]
SLOW = [(name, None, batch) for name in ("Qwen3-0.6B", "Llama-3.2-1B") for batch in (1, 3)]


@pytest.mark.parametrize(
    ("name", "layers", "batch"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_a_decode_step_is_the_same_with_and_without_the_kernels(monkeypatch, name, layers, batch):
    config = random_model.shape(name)
    config = dataclasses.replace(config, layers=config.layers[:layers])
    model = random_model.graded(config)
    thresholds = model_thresholds(model, jnp.asarray(random_model.TARGETS), jnp.full(batch, 8.0))
    prompt = jax.random.randint(jax.random.key(1), (batch, 16), 0, model.config.vocab_size)
    cache = KVCache.create(model.config, batch, 64, model.compute_dtype)
    _, cache = engine.prefill(model, prompt, jnp.full(batch, 16), cache)

    def step():
        run = jax.jit(lambda *args: engine.decode_step(*args))
        logits, _, stats = run(model, prompt[:, 0], cache, thresholds)
        return np.asarray(logits), np.asarray(stats.bits), np.asarray(stats.max_abs)

    logits, bits, max_abs = step()
    np.testing.assert_array_equal(step()[0], logits)
    monkeypatch.setattr(decode_rows, "supports", lambda *_: "switched off")
    expected, expected_bits, expected_max_abs = step()
    # At full bits, the rounding of an activation cannot change its level.
    assert np.linalg.norm(logits - expected) < 2e-2 * np.linalg.norm(expected)
    np.testing.assert_array_equal(bits, expected_bits)
    np.testing.assert_allclose(max_abs, expected_max_abs, rtol=0.1)
