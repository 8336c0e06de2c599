"""Quantizes one linear layer in ranges of outputs and compares the fit with NumPy in float64."""

import jax.numpy as jnp
import matvec_oracle
import numpy as np
import pytest

from checkpoints_tools.calibration import histogram
from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.convert import quantize_linear
from checkpoints_tools.quantizers import QUANTIZERS, level_fit
from pallas_kernels import NestedWeight, codes


def rounding(w, sensitivities, max_bits=8):
    return quantize_linear.Rounding(
        name="layers.0.qkv",
        shape=w.shape,
        inputs=LinearStatistics(np.zeros(histogram.BINS, np.int64), 1.0),
        sensitivities=sensitivities,
        quantizer=QUANTIZERS["rtn"],
        max_bits=max_bits,
    )


def quantized(w, sensitivities, max_bits=8):
    """Returns the layer with fitted level gains, and its fit."""
    layer = rounding(w, sensitivities, max_bits)
    leaves, fit = quantize_linear.quantize_linear(layer, lambda outputs: w[:, outputs])
    arrays = {name: jnp.asarray(array) for name, array in leaves.items()}
    gains = jnp.asarray(quantize_linear.fit_gains(fit))
    return NestedWeight(in_features=w.shape[0], out_features=w.shape[1], level_gains=gains, **arrays), fit


@pytest.mark.parametrize("max_bits", [2, 8])
def test_gains_are_least_squares_and_errors_leave_them_out(monkeypatch, max_bits):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 1200)).astype(np.float32)
    sensitivities = rng.uniform(0.5, 2, 1200)
    monkeypatch.setattr(quantize_linear, "RANGE_WEIGHTS", 256 * 512)  # Three ranges.
    weight, fit = quantized(w, sensitivities, max_bits)
    weight.check()
    plain = NestedWeight(weight.planes, weight.scales, 256, 1200)
    for level in range(1, max_bits // 2 + 1):
        read = np.asarray(codes.dequantize(plain, level), np.float64)
        best = np.sum(w * read * sensitivities) / np.sum(read**2 * sensitivities)
        gain = 1 if level == max_bits // 2 else best
        np.testing.assert_allclose(weight.level_gains[level - 1], gain, rtol=1e-5)
        expected = np.mean((w - read) ** 2 * sensitivities)
        np.testing.assert_allclose(fit.errors[level], expected, rtol=1e-3)
    np.testing.assert_allclose(fit.errors[0], np.mean(w**2 * sensitivities), rtol=1e-5)


@pytest.mark.parametrize("outputs", [64, 700, 1000, 1985])
def test_ranges_are_stored_as_the_whole_layer(monkeypatch, outputs):
    w = np.random.default_rng(0).standard_normal((128, outputs)).astype(np.float32)
    monkeypatch.setattr(quantize_linear, "RANGE_WEIGHTS", 128 * 512)
    weight, _ = quantized(w, np.ones(outputs))
    whole = codes.quantize(jnp.asarray(w))
    np.testing.assert_array_equal(weight.planes, whole.planes)
    np.testing.assert_array_equal(weight.scales, whole.scales)


def test_measuring_packs_nothing_and_finds_the_same_fit(monkeypatch):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 1200)).astype(np.float32)
    sensitivities = rng.uniform(0.5, 2, 1200)
    _, expected = quantized(w, sensitivities)
    monkeypatch.setattr(quantize_linear, "from_codes", lambda *_, **__: pytest.fail("packed"))
    fit = quantize_linear.measure_linear(rounding(w, sensitivities), lambda outputs: w[:, outputs])
    for name, value, want in zip(fit._fields, fit, expected, strict=True):
        np.testing.assert_array_equal(value, want, err_msg=name)


@pytest.mark.parametrize("shape", [(200, 700), (128, 512)])
@pytest.mark.parametrize("planes", [1, 3, 4])
def test_the_fit_of_rounded_codes_is_that_of_the_packed_weight(shape, planes):
    rng = np.random.default_rng(7)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    sensitivities = jnp.asarray(rng.uniform(0.5, 2, shape[1]), jnp.float32)
    rounded = QUANTIZERS["rtn"](w, LinearStatistics.empty(), name="w")
    fit = level_fit(w, rounded, sensitivities, num_planes=planes)
    packed = codes.from_codes(rounded.codes, rounded.scales, max_bits=2 * planes)
    read = np.stack([matvec_oracle.dequantize(packed, level) for level in range(planes + 1)])
    error = np.asarray(w, np.float64) - read
    np.testing.assert_allclose(fit.errors, np.mean(error**2 * sensitivities, axis=(1, 2)), rtol=1e-4)
    squares, slopes = (np.mean(p * sensitivities, axis=(1, 2))[1:] for p in (read**2, read * error))
    np.testing.assert_allclose(fit.squares, squares, rtol=1e-4)
    np.testing.assert_allclose(fit.slopes, slopes, atol=1e-6 * squares[0])


def test_level_1_of_gaussian_weights_is_too_large_by_a_seventh():
    """Level 1 has two intervals on each side of 0; the largest of 128 weights sets their width."""
    w = np.random.default_rng(1).standard_normal((1280, 512)).astype(np.float32)
    weight, fit = quantized(w, np.ones(512))
    assert 0.85 < weight.level_gains[0] < 0.88
    assert codes.level_errors(jnp.asarray(w), weight)[1] < 0.9 * fit.errors[1]


def test_a_layer_of_zeros_has_gains_of_1():
    weight, fit = quantized(np.zeros((128, 512), np.float32), np.ones(512))
    np.testing.assert_array_equal(weight.level_gains, np.ones(4))
    assert not fit.errors.any()
