"""The baselines against their published mathematics on small cases, and a whole model through each."""

import hf_directories
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_tools.baselines import groups, model
from checkpoints_tools.baselines.awq import awq, channel_scales, output_error
from checkpoints_tools.baselines.gptq import gptq
from grinqh_jax.hf import load_decoder, open_checkpoint

rng = np.random.default_rng(11)
K, N, BITS = 160, 24, 3
MIX = rng.standard_normal((K, K)) * 0.85 ** np.arange(K)
X = rng.standard_normal((600, K)) @ MIX.T + 0.1 * rng.standard_normal((600, K))
X[:, ::17] *= 12
HESSIAN = X.T @ X / len(X)
W = rng.standard_normal((K, N)).astype(np.float32)


def numpy_grid(w, bits):
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    return scale, np.clip(np.round(-low / scale), 0, 2**bits - 1)


def numpy_round(w, scale, zero, bits):
    return scale * (np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero)


def numpy_obq(w, hessian, bits, order):
    """Optimal brain quantization in a fixed order, an inverse of the rest at every step: no Cholesky."""
    w, hessian = w[order].astype(np.float64), hessian[np.ix_(order, order)].copy()
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(w))
    for i in range(len(w)):
        if i % 128 == 0:
            grid = numpy_grid(w[i : i + 128], bits)
        rounded = numpy_round(w[i], *grid, bits)
        inverse = np.linalg.inv(hessian[i:, i:])
        w[i:] -= inverse[:, :1] / inverse[0, 0] * (w[i] - rounded)
        w[i] = rounded
    return w[np.argsort(order)]


@given(st.integers(1, 300), st.sampled_from([2, 3, 4]), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_rtn_is_off_by_half_a_step_and_exact_on_its_own_values(k, bits, seed):
    w = np.random.default_rng(seed).standard_normal((k, 5)).astype(np.float32)
    rounded = np.asarray(groups.rtn(jnp.asarray(w), bits))
    for start in range(0, k, 128):
        scale, _ = numpy_grid(w[start : start + 128], bits)
        # float16 scales may fall short of the range by a thousandth of it
        assert (np.abs(rounded - w)[start : start + 128] <= scale * (0.5 + 2**bits / 1000)).all()


def test_honest_bits():
    assert groups.bits_read(4) == 4 + 20 / 128


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_optimal_brain_quantization_in_order(act_order):
    order = np.argsort(-np.diag(HESSIAN), kind="stable") if act_order else np.arange(K)
    expected = numpy_obq(W, HESSIAN, BITS, order)
    found = np.asarray(gptq(jnp.asarray(W), jnp.asarray(HESSIAN), BITS, act_order=act_order))
    # A value on the verge may round the other way, and what follows it then differs too.
    same = np.isclose(found, expected, atol=1e-3).all(axis=0)
    assert same.mean() > 0.8
    error = [
        float(output_error(jnp.asarray(v - W, jnp.float32), jnp.asarray(HESSIAN))) for v in (found, expected)
    ]
    assert abs(error[0] / error[1] - 1) < 0.02


def test_gptq_with_independent_inputs_is_rtn():
    found = gptq(jnp.asarray(W), jnp.diag(jnp.full(K, 3.0)), BITS)
    np.testing.assert_allclose(found, groups.rtn(jnp.asarray(W), BITS), atol=1e-5)


def test_gptq_and_awq_leave_less_error_than_rtn():
    w, hessian = jnp.asarray(W), jnp.asarray(HESSIAN, jnp.float32)
    magnitude = jnp.asarray(np.abs(X).mean(0), jnp.float32)
    plain = output_error(groups.rtn(w, BITS) - w, hessian)
    assert output_error(gptq(w, hessian, BITS) - w, hessian) < 0.5 * plain
    assert output_error(awq(w, hessian, magnitude, BITS) - w, hessian) < 0.8 * plain


def test_a_dead_channel_costs_nothing():
    hessian = HESSIAN.copy()
    hessian[7], hessian[:, 7] = 0, 0
    found = np.asarray(gptq(jnp.asarray(W), jnp.asarray(hessian), BITS))
    assert np.isfinite(found).all()
    assert (found[7] == 0).all()


def test_awq_scales_are_powers_of_the_magnitude():
    magnitude = jnp.asarray([1.0, 4.0, 16.0, 0.0])
    np.testing.assert_allclose(channel_scales(magnitude, 0.0), 1)
    np.testing.assert_allclose(channel_scales(magnitude, 0.5), [0.5, 1, 2, 0.5], rtol=1e-6)


@pytest.mark.parametrize("method", model.METHODS)
def test_a_whole_model(method, tmp_path):
    state = {k: v.astype(np.float32) for k, v in hf_directories.random_state(hf_directories.LLAMA3).items()}
    source = open_checkpoint(hf_directories.write(tmp_path / "source", hf_directories.LLAMA3, state=state))
    windows = rng.integers(0, 300, (2, 64)).astype(np.int32)
    expected = load_decoder(source, jnp.float32)(windows)
    differences = []
    for bits in (3, 8):
        model.write(source, windows, tmp_path / f"{bits}", method=method, bits=bits)
        logits = load_decoder(open_checkpoint(tmp_path / f"{bits}"), jnp.float32)(windows)
        differences.append(float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)))
    assert differences[1] < 0.03
    assert 5 * differences[1] < differences[0] < 1
    # What is written are whole multiples of a group's step.
    kernel = open_checkpoint(tmp_path / "3").read("layers.1.down.kernel")[:128, :4]
    if method != "awq":
        for column in kernel.T:
            assert len(np.unique(column.round(6))) <= 8
