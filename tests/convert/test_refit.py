"""The refit: least squares compared with NumPy in float64, its effect, and the choice of tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from checkpoints_tools.convert import least_squares, refit, refit_tokens
from checkpoints_tools.convert.coded_linear import CodedLinear
from checkpoints_tools.convert.least_squares import FitWindow
from checkpoints_tools.source.layer import dense_layer, embed, read_layer
from grinqh_jax.benchmarking import random_model
from grinqh_jax.hf import open_checkpoint
from grinqh_jax.model.apply import Dense
from grinqh_jax.model.linear import GradedLinear
from pallas_kernels import quantize

SKIPPED = 4
"""Number of first positions that are not scored."""

FULL_PRECISION_WEIGHT, DAMPING = 2.0, 0.1


def refitted(w, windows, least_read):
    return least_squares.refitted(w, windows, least_read, least_squares.moments(windows, least_read))


def observed(rng, *, deficit, windows=3, t=128, k=24, n=10):
    """Yields windows with exact inputs, graded inputs with errors, and deficits of the outputs."""
    mixing = rng.standard_normal((k, k))
    for _ in range(windows):
        exact = rng.standard_normal((t, k)) @ mixing
        graded = exact + 0.5 * rng.standard_normal((t, k))
        lacking = np.float32(0.5 * graded[:, :n]) if deficit else None
        yield FitWindow(np.float32(exact), np.float32(graded), lacking)


@pytest.mark.parametrize("with_deficit", [True, False])
def test_the_step_matches_damped_least_squares_in_numpy(with_deficit):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((24, 10)).astype(np.float32)
    windows = list(observed(rng, deficit=with_deficit))
    new = refitted(w, windows, 0.5)
    x, z = (np.concatenate([np.float64(window[i])[SKIPPED:] for window in windows]) for i in (0, 1))
    deficit = (
        np.concatenate([np.float64(window.deficit)[SKIPPED:] for window in windows]) if with_deficit else 0
    )
    z = np.where(np.abs(z) >= 0.5, z, 0)
    # The oracle: both conditions and the damping are rows of one least-squares problem.
    a = z.T @ z + FULL_PRECISION_WEIGHT * x.T @ x
    damping = np.sqrt(DAMPING * np.trace(a) / 24) * np.eye(24)
    weight = np.sqrt(FULL_PRECISION_WEIGHT)
    rows = np.concatenate([z, weight * x, damping])
    wanted = np.concatenate([x @ w + deficit, weight * x @ w, damping @ w])
    step = np.linalg.lstsq(rows, wanted, rcond=None)[0] - w
    residual = x @ w + deficit - z @ w
    reduction = np.sum(step * (z.T @ residual))
    chance = 24 / len(z) * np.sum(residual**2) / (1 + FULL_PRECISION_WEIGHT)
    assert 0.1 < chance / reduction < 0.9
    np.testing.assert_allclose(new - w, (1 - chance / reduction) * step, rtol=1e-3, atol=1e-4)


def test_a_channel_that_is_read_replaces_a_correlated_one_that_is_skipped(monkeypatch):
    """One of two proportional channels is too small to be read. Damping would favour moving both."""
    monkeypatch.setattr(least_squares, "DAMPING", 0.01)
    rng = np.random.default_rng(1)
    large = rng.choice([-1, 1], (512, 1)) * rng.uniform(2, 4, (512, 1))
    x = np.float32(np.concatenate([large, 0.3 * large], axis=1))
    z = np.float32(np.concatenate([large, 0 * large], axis=1))
    w = np.array([[1.0], [1.0]], np.float32)
    new = refitted(w, [FitWindow(x, x, None)], 1.5)
    graded, exact = (np.mean((inputs @ new - x @ w) ** 2) for inputs in (z, x))
    assert graded < 0.1 * np.mean((z @ w - x @ w) ** 2)
    assert exact < 0.01 * np.mean((x @ w) ** 2)


def test_noise_is_not_fitted():
    rng = np.random.default_rng(2)
    w = rng.standard_normal((40, 8)).astype(np.float32)
    moved = []
    for t in (30, 4000):
        x = np.float32(rng.standard_normal((t, 40)))
        noise = np.float32(rng.standard_normal((t, 8)))
        moved.append(np.abs(refitted(w, [FitWindow(x, x, noise)], 0.0) - w).max())
    assert moved[0] == 0  # Fewer tokens than channels.
    assert moved[1] < 0.01


@pytest.mark.slow
def test_states_pass_through_the_layer_and_exact_inputs_keep_the_weights(tmp_path):
    source = open_checkpoint(tiny_models.write(tmp_path / "m"))
    windows = np.asarray(tiny_models.encode(tiny_models.TEXT[:192]), np.int32).reshape(2, 96)
    hidden = embed(source, windows, jnp.float32)
    spec = source.config.layers[0]
    tables = {f"layers.0.{name}": np.zeros((2, 4), np.float32) for name in spec.names}
    states = refit.RefitStates(hidden.copy(), hidden[:1].copy(), tables, (1.0, 8.0), source.config.layers)
    kernels, vectors = read_layer(source, 0)
    layer = dense_layer(source, 0, kernels, vectors, jnp.float32)
    states.apply_norm(layer.input_norm)
    for projection in spec.names:
        w = np.asarray(kernels[projection], np.float32)
        for outputs in (slice(0, 20), slice(20, None)):
            new = states.fitted(f"layers.0.{projection}", w[:, outputs], outputs)
            assert np.abs(new - w[:, outputs]).max() < 0.02 * np.abs(w).max()
        states.advance(f"layers.0.{projection}", layer, nested(w), np.ones(4, np.float32))
    positions = jnp.broadcast_to(jnp.arange(96), (2, 96))
    expected, _ = layer("layer", jnp.asarray(hidden), positions, Dense())
    np.testing.assert_allclose(states._exact.stream, expected, rtol=1e-4, atol=1e-5)
    # Thresholds of 0 read all of the 8-bit codes.
    np.testing.assert_allclose(states._graded.stream, expected, atol=0.02 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_streams_survive_a_file(tmp_path, dtype):
    names = ["exact 0", "exact 1", "graded 0", "graded 1", "other 0"]
    numbers = np.random.default_rng(0).standard_normal((5, 5, 3)).astype(dtype)
    layers = random_model.shape("Qwen3-8B").layers
    first, second = (
        refit.RefitStates(np.zeros((2, 5, 3), dtype), np.zeros((1, 5, 3), dtype), {}, (1.0, 8.0), layers)
        for _ in range(2)
    )
    first.streams = dict(zip(names, numbers, strict=True))
    np.savez(tmp_path / "file.npz", **first.streams)
    second.streams = dict(np.load(tmp_path / "file.npz"))
    assert list(second.streams) == names
    for stream, expected in zip(second.streams.values(), numbers, strict=True):
        assert stream.dtype == dtype
        np.testing.assert_array_equal(stream, expected)


def calibration(count, length=1024):
    return np.zeros((count, length), np.int32)


@pytest.mark.parametrize(("dtype", "windows"), [(jnp.float32, 16), (jnp.bfloat16, 24)])
def test_8b_is_refitted_in_2_gib_of_states(dtype, windows):
    """``down`` has 12,288 inputs, three times as many as the other projections."""
    widths = refit_tokens.input_widths(random_model.shape("Qwen3-8B"))
    assert widths == {"qkv": 4096, "o": 4096, "gate_up": 4096, "down": 12288, "lm_head": 4096}
    fitting = refit_tokens.fitting_windows(calibration(24), widths, jnp.dtype(dtype).itemsize)
    assert len(fitting) == windows
    assert windows * (1024 - SKIPPED) > 12288
    assert 2 * windows * 1024 * (4096 + 12288) * jnp.dtype(dtype).itemsize <= 2 * 2**30
    assert refit_tokens.refitted_projections(fitting, widths) == list(widths)
    assert refit_tokens.shortage(fitting, widths) == ""


@pytest.mark.parametrize("shape", random_model.shapes())
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_published_shape_has_enough_tokens(shape, itemsize):
    widths = refit_tokens.input_widths(random_model.shape(shape))
    fitting = refit_tokens.fitting_windows(calibration(32), widths, itemsize)
    assert len(fitting) * (1024 - SKIPPED) > 1.1 * max(widths.values())
    assert refit_tokens.refitted_projections(fitting, widths) == list(widths)


@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 768), (512, 1408)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_small_models_are_fitted_to_12288_tokens(hidden, intermediate, itemsize):
    """Covers the bundled model and ``docs/quality.md``, whose figures depend on this number."""
    widths = dict.fromkeys(("qkv", "o", "gate_up", "lm_head"), hidden) | {"down": intermediate}
    assert refit_tokens.fitting_windows(calibration(48), widths, itemsize).size == 12288


def test_projections_with_too_few_tokens_are_named_and_have_no_moments(monkeypatch):
    widths = {"qkv": 8, "o": 4, "gate_up": 8, "down": 41, "lm_head": 8}
    windows = calibration(2, 24)  # 40 of 48 tokens are scored.
    assert refit_tokens.refitted_projections(windows, widths) == []
    assert "qkv (needs 4,096 tokens)" in refit_tokens.shortage(windows, widths)
    monkeypatch.setattr(refit_tokens, "LEAST_TOKENS", 48)
    assert refit_tokens.refitted_projections(windows, widths) == ["qkv", "o", "gate_up", "lm_head"]
    monkeypatch.setattr(refit_tokens, "LEAST_TOKENS", 1)
    assert refit_tokens.shortage(windows, widths) == (
        "weights were not refitted in down (needs 42 tokens): the calibration text provides 40 (at most three"
        " quarters of it are used)"
    )
    for k in (39, 40, 41):
        x = np.random.default_rng(k).standard_normal((24, k)).astype(np.float32)
        fitted = least_squares.moments([FitWindow(x, x, None)] * 2, 0.0) is not None
        assert refit_tokens.refitted_projections(windows, {"down": k}) == (["down"] if fitted else [])
        assert fitted == (k < 40)


def nested(kernel):
    """Returns the projection in 8-bit codes."""
    weight = quantize(jnp.asarray(kernel, jnp.float32))
    arrays = weight.planes, weight.scales, jnp.zeros((2, 4)), weight.level_gains, jnp.float32(1)
    linear = GradedLinear(*arrays, in_features=weight.in_features, out_features=weight.out_features)
    return CodedLinear.of_planes(linear)
