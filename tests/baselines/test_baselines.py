"""The baselines compared with their published mathematics on small cases, and on a whole model."""

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from forward_passes import forward
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples, shapes

from checkpoints_tools.baselines import __main__ as command
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
    """Optimal brain quantization in a fixed order: eliminates rows of the inverse in turn, no Cholesky."""
    w, hessian = w[order].astype(np.float64), hessian[np.ix_(order, order)].copy()
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(w))
    inverse = np.linalg.inv(hessian)
    for i in range(len(w)):
        if i % 128 == 0:
            grid = numpy_grid(w[i : i + 128], bits)
        rounded = numpy_round(w[i], *grid, bits)
        w[i:] -= inverse[:, :1] / inverse[0, 0] * (w[i] - rounded)
        w[i] = rounded
        inverse = (inverse - np.outer(inverse[0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return w[np.argsort(order)]


def numpy_awq(w, hessian, magnitude, bits):
    """AWQ by plain loops over the alphas, then over the shrinks of each group and output."""

    def rounded(w, shrink=1.0):
        pieces = []
        for start in range(0, len(w), 128):
            group = w[start : start + 128]
            low, high = np.minimum(group.min(0), 0) * shrink, np.maximum(group.max(0), 0) * shrink
            scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
            zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
            pieces.append(numpy_round(group, scale, zero, bits))
        return np.concatenate(pieces)

    best = np.inf
    for alpha in np.arange(20) / 20:
        s = magnitude**alpha
        s = (s / np.sqrt(s.max() * s.min()))[:, None]
        error = rounded(w * s) / s - w
        loss = np.sum(error * (hessian @ error))
        if loss < best:
            best, scales = loss, s
    scaled, expected = w * scales, np.empty_like(w, np.float64)
    for start in range(0, len(w), 128):
        rows = slice(start, start + 128)
        least = np.full(w.shape[1], np.inf)
        for shrink in 1 - np.arange(10) / 20:
            candidate = rounded(scaled[rows], shrink)
            error = (candidate - scaled[rows]) / scales[rows]
            loss = np.sum(error * (hessian[rows, rows] @ error), axis=0)
            expected[rows] = np.where(loss < least, candidate / scales[rows], expected[rows])
            least = np.minimum(loss, least)
    return expected


@given(
    shapes((1,), (5,), (127,), (128,), (129,), (300,)), st.sampled_from([2, 3, 4]), st.integers(0, 2**32 - 1)
)
@examples(20)
def test_rtn_errs_by_half_a_step_at_most(shape, bits, seed):
    (k,) = shape
    w = np.random.default_rng(seed).standard_normal((k, 5)).astype(np.float32)
    rounded = np.asarray(jax.jit(groups.rtn, static_argnums=1)(w, bits))
    for start in range(0, k, 128):
        scale, _ = numpy_grid(w[start : start + 128], bits)
        # float16 scales may miss a thousandth of the range.
        assert (np.abs(rounded - w)[start : start + 128] <= scale * (0.5 + 2**bits / 1000)).all()


def test_bits_read_include_scales_and_zero_points():
    assert groups.bits_read(4) == 4 + 20 / 128


@pytest.mark.parametrize(("bits", "act_order"), [(2, False), (3, False), (3, True), (4, False), (4, True)])
def test_gptq_is_optimal_brain_quantization_in_order(bits, act_order):
    order = np.argsort(-np.diag(HESSIAN), kind="stable") if act_order else np.arange(K)
    expected = numpy_obq(W, HESSIAN, bits, order)
    quantized = np.asarray(gptq(jnp.asarray(W), jnp.asarray(HESSIAN), bits, act_order=act_order))
    # A value between two steps may round the other way, and later values then differ too.
    same = np.isclose(quantized, expected, atol=1e-3).all(axis=0)
    assert same.mean() > 0.8
    error = [
        float(output_error(jnp.asarray(v - W, jnp.float32), jnp.asarray(HESSIAN)))
        for v in (quantized, expected)
    ]
    assert abs(error[0] / error[1] - 1) < 0.02


def test_gptq_with_independent_inputs_equals_rtn():
    quantized = gptq(jnp.asarray(W), jnp.diag(jnp.full(K, 3.0)), BITS)
    np.testing.assert_allclose(quantized, groups.rtn(jnp.asarray(W), BITS), atol=1e-5)


def test_gptq_and_awq_leave_less_error_than_rtn():
    w, hessian = jnp.asarray(W), jnp.asarray(HESSIAN, jnp.float32)
    magnitude = jnp.asarray(np.abs(X).mean(0), jnp.float32)
    plain = output_error(groups.rtn(w, BITS) - w, hessian)
    assert output_error(gptq(w, hessian, BITS) - w, hessian) < 0.5 * plain
    assert output_error(awq(w, hessian, magnitude, BITS) - w, hessian) < 0.8 * plain


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_awq_matches_its_grid_search(bits):
    magnitude = np.abs(X).mean(0)
    expected = numpy_awq(W.astype(np.float64), HESSIAN, magnitude, bits)
    quantized = np.asarray(awq(jnp.asarray(W), jnp.asarray(HESSIAN), jnp.asarray(magnitude), bits))
    assert np.isclose(quantized, expected, atol=1e-3).all(axis=0).mean() > 0.8
    error = [
        float(output_error(jnp.asarray(v - W, jnp.float32), jnp.asarray(HESSIAN)))
        for v in (quantized, expected)
    ]
    assert error[0] == pytest.approx(error[1], rel=0.02)


def test_more_damping_approaches_rtn():
    w, hessian = jnp.asarray(W), jnp.asarray(HESSIAN)
    errors = [float(output_error(gptq(w, hessian, BITS, damping=d) - w, hessian)) for d in (0.01, 1.0, 1e4)]
    assert errors[0] < errors[1] < errors[2]
    np.testing.assert_allclose(gptq(w, hessian, BITS, damping=1e6), groups.rtn(w, BITS), atol=2e-3)


def test_a_dead_channel_costs_nothing():
    hessian = HESSIAN.copy()
    hessian[7], hessian[:, 7] = 0, 0
    quantized = np.asarray(gptq(jnp.asarray(W), jnp.asarray(hessian), BITS))
    assert np.isfinite(quantized).all()
    assert (quantized[7] == 0).all()


def test_awq_scales_are_powers_of_the_magnitude():
    magnitude = jnp.asarray([1.0, 4.0, 16.0, 0.0])
    np.testing.assert_allclose(channel_scales(magnitude, 0.0), 1)
    np.testing.assert_allclose(channel_scales(magnitude, 0.5), [0.5, 1, 2, 0.5], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", model.METHODS)
def test_a_whole_model(method, tmp_path):
    state = {k: v.astype(np.float32) for k, v in hf_directories.random_state(hf_directories.LLAMA3).items()}
    source = open_checkpoint(hf_directories.write(tmp_path / "source", hf_directories.LLAMA3, state=state))
    windows = rng.integers(0, 300, (2, 64)).astype(np.int32)
    expected = np.asarray(forward(load_decoder(source, jnp.float32), windows))
    differences = []
    for bits in (3, 8):
        options = model.Options(method=method, bits=bits)
        model.quantize(source, windows, tmp_path / f"{bits}", options)
        quantized = load_decoder(open_checkpoint(tmp_path / f"{bits}"), jnp.float32)
        logits = np.asarray(forward(quantized, windows))
        differences.append(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    assert differences[1] < 0.03
    assert 5 * differences[1] < differences[0] < 1
    # The written weights are whole multiples of a group's step.
    kernel = open_checkpoint(tmp_path / "3").read("layers.1.down.kernel")[:128, :4]
    if method != "awq":
        for column in kernel.T:
            assert len(np.unique(column.round(6))) <= 8


def test_the_command_refuses_unusable_flags(tmp_path, capsys):
    source, file = tiny_models.write(tmp_path / "source"), tiny_models.text_file(tmp_path / "calib.txt")
    flags = ["--model", str(source), "--calib", str(file), "--method", "rtn", "--w-bits", "3"]
    for more, message in (
        (["--tokens", "0"], "--tokens 0: must be positive"),
        (["--damping", "-1"], "--damping -1: must be a positive number"),
        (["--damping", "nan"], "--damping nan: must be"),
        (["--out", str(file / "x")], "Not a directory"),
        (["--out", str(source)], "exists; name a new directory"),
    ):
        assert command.main([*flags, "--out", str(tmp_path / "out"), *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "out").exists()
