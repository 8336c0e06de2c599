"""Refitted weights in codes: their leading digits, and the bound on the change at full precision."""

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools.convert import refitted_codes
from checkpoints_tools.convert.coded_linear import level_weights
from checkpoints_tools.convert.refitted_codes import EXCESS, SHARES, bounded, with_leading_digits
from checkpoints_tools.quantizers import RoundedWeight
from pallas_kernels import codes

SKIPPED = 4
"""Number of first positions that are not scored."""


def rounded(w):
    scales = codes.max_abs_scales(w)
    return RoundedWeight(codes.encode(w, scales), scales)


def weights(seed, k=256, n=64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((k, n)), jnp.float32)


def read(rounded, level):
    return np.asarray(level_weights(rounded.codes, rounded.scales, level, jnp.float32), np.float64)


def test_low_levels_read_the_target_and_full_precision_the_original():
    w = weights(0)
    target = w + 0.05 * weights(1)
    plain = rounded(w)
    both = with_leading_digits(plain, target)
    wanted = RoundedWeight(codes.encode(target, plain.scales), plain.scales)
    for level in (1, 2):
        np.testing.assert_array_equal(read(both, level), read(wanted, level))
    # The oracle: of all codes with the leading digits of the target, the one nearest to the original's.
    first = np.asarray(wanted.codes, int) // 16 * 16
    choices = first[..., None] + np.arange(16)
    nearest = np.argmin(np.abs(choices - np.asarray(plain.codes, int)[..., None]), axis=-1)
    np.testing.assert_array_equal(both.codes, first + nearest)
    left, step = np.mean((read(both, 4) - read(plain, 4)) ** 2), np.mean(np.square(target - w))
    assert left < 0.15 * step


def error(rounded, w, inputs, sensitivities):
    x = np.concatenate([np.float64(window[SKIPPED:]) for window in inputs])
    return np.sum(np.asarray(sensitivities, np.float64) * np.square(x @ (read(rounded, 4) - np.float64(w))))


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_the_largest_share_within_the_bound_is_taken(size):
    rng = np.random.default_rng(2)
    w, step = weights(0), size * weights(1)
    inputs = [jnp.asarray(rng.standard_normal((40, 256)), jnp.float32) for _ in range(2)]
    sensitivities = jnp.asarray(rng.uniform(0.1, 2, 64), jnp.float32)
    plain = rounded(w)
    most = (1 + EXCESS) * error(plain, w, inputs, sensitivities)
    target, result = bounded(w, w + step, plain, inputs, sensitivities, num_planes=4)
    assert error(result, w, inputs, sensitivities) <= most * 1.001
    share = float(jnp.sum((target - w) * step) / jnp.sum(step**2))
    index = int(np.argmin(np.abs(np.array(SHARES) - share)))
    assert share == pytest.approx(SHARES[index], rel=1e-3)
    assert (index == 0) == (size == 0.01)
    if index:
        larger = with_leading_digits(plain, w + SHARES[index - 1] * step)
        assert error(larger, w, inputs, sensitivities) > most


def test_a_refit_that_no_share_allows_keeps_the_original(monkeypatch):
    monkeypatch.setattr(refitted_codes, "EXCESS", 1e-9)
    w = weights(0)
    inputs = [weights(3, 40, 256)]
    target, result = bounded(w, w + 100 * weights(1), rounded(w), inputs, jnp.ones(64), num_planes=4)
    np.testing.assert_array_equal(target, w)
    np.testing.assert_array_equal(result.codes, rounded(w).codes)
