"""One linear layer quantized in blocks, against NumPy's least squares in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools.calibration import histogram
from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.convert import quantize_linear as module
from checkpoints_tools.quantizers import QUANTIZERS
from pallas_kernels import NestedWeight, codes


def quantized(w, sensitivities, max_bits=8, gained=True):
    """The layer as it is stored, and its levels' errors."""
    counts = np.zeros(histogram.BINS, np.int64)
    leaves, errors = module.quantize_linear(
        lambda outputs: w[:, outputs],
        w.shape,
        LinearStatistics(counts, 1.0),
        QUANTIZERS["rtn"],
        sensitivities=sensitivities,
        max_bits=max_bits,
        gained=gained,
        name="layers.0.qkv",
    )
    arrays = {name: jnp.asarray(leaves[name]) for name in ("planes", "scales")}
    arrays["level_gains"] = jnp.asarray(leaves["gains"])
    return NestedWeight(in_features=w.shape[0], out_features=w.shape[1], **arrays), errors


@pytest.mark.parametrize("max_bits", [2, 8])
def test_gains_are_least_squares_and_errors_those_without_them(monkeypatch, max_bits):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 1200)).astype(np.float32)
    sensitivities = rng.uniform(0.5, 2, 1200)
    monkeypatch.setattr(module, "_BLOCK_WEIGHTS", 256 * 512)  # three blocks
    weight, errors = quantized(w, sensitivities, max_bits)
    weight.check()
    plain = NestedWeight(weight.planes, weight.scales, 256, 1200)
    for level in range(1, max_bits // 2 + 1):
        read = np.asarray(codes.dequantize(plain, level), np.float64)
        best = np.sum(w * read * sensitivities) / np.sum(read**2 * sensitivities)
        gain = 1 if level == max_bits // 2 else best
        np.testing.assert_allclose(weight.level_gains[level - 1], gain, rtol=1e-5)
        expected = np.mean((w - read) ** 2 * sensitivities)
        np.testing.assert_allclose(errors[level], expected, rtol=1e-3)
    np.testing.assert_allclose(errors[0], np.mean(w**2 * sensitivities), rtol=1e-5)


def test_level_1_of_gaussian_weights_is_too_large_by_a_seventh():
    """The middles of two intervals a side, for 128 weights whose largest spans them."""
    w = np.random.default_rng(1).standard_normal((1280, 512)).astype(np.float32)
    weight, errors = quantized(w, np.ones(512))
    assert 0.85 < weight.level_gains[0] < 0.88
    assert codes.level_errors(jnp.asarray(w), weight)[1] < 0.9 * errors[1]


def test_levels_as_they_are_have_gains_of_1():
    w = np.random.default_rng(1).standard_normal((128, 512)).astype(np.float32)
    weight, _ = quantized(w, np.ones(512), gained=False)
    np.testing.assert_array_equal(weight.level_gains, np.ones(4))


def test_a_layer_of_zeros_has_gains_of_1():
    weight, errors = quantized(np.zeros((128, 512), np.float32), np.ones(512))
    np.testing.assert_array_equal(weight.level_gains, np.ones(4))
    assert not errors.any()
