"""The lane program of the graded matvec on the emulator, against the float64 oracle."""

import dataclasses

import numpy as np
import pytest
from emulation import emulate
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from matvec_cases import DEFAULT_CONFIG, Case, assert_agrees_with_oracle

from pallas_kernels.matvec.mosaic_gpu import Config

configs = st.builds(
    Config,
    warpgroups=st.sampled_from([1, 2]),
    warps_per_group=st.sampled_from([1, 2, 4]),
    ring_slots=st.sampled_from([2, 4, 8]),
)
cases = st.builds(
    Case,
    in_features=st.integers(1, 600),
    out_features=st.integers(1, 600),
    rows=st.integers(1, 8),
    max_bits=st.sampled_from([2, 4, 6, 8]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    activations=st.sampled_from(["gaussian", "outliers", "heavy", "zeros", "all-zero"]),
    config=configs,
    seed=st.integers(0, 2**32 - 1),
)


@given(case=cases)
@examples(20, in_ci=300)
def test_agrees_with_float64(case):
    x, weight, thresholds = case.arrays()
    assert_agrees_with_oracle(x, weight, thresholds, *emulate(x, weight, thresholds, case.config))


@given(
    case=cases,
    whole_tiles=st.integers(0, 2),
    pieces=st.integers(1, 7),
    lacking=st.integers(0, 63),
)
@examples(6, in_ci=100)
def test_a_last_tile_of_any_number_of_pieces(case, whole_tiles, pieces, lacking):
    out_features = 512 * whole_tiles + 64 * pieces - lacking
    case = dataclasses.replace(case, in_features=case.in_features % 300 + 1, out_features=out_features)
    x, weight, thresholds = case.arrays()
    assert weight.scales.shape[1] % 512 == 64 * pieces or pieces == 7  # 960 and more may be whole tiles.
    assert_agrees_with_oracle(x, weight, thresholds, *emulate(x, weight, thresholds, case.config))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(bad):
    case = Case(300, 600, rows=3)
    x, weight, thresholds = case.arrays()
    clean, _ = emulate(x, weight, thresholds, case.config)
    x[1, 200] = bad
    y, _ = emulate(x, weight, thresholds, case.config)
    assert not np.isfinite(y[1]).any()
    np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10, 1e37])
def test_activations_of_any_size(size):
    x, weight, _ = Case(256, 512).arrays()
    x = (x / np.abs(x).max() * size).astype(np.float32)
    thresholds = np.zeros((1, 4), np.float32)
    y, bits = emulate(x, weight, thresholds, DEFAULT_CONFIG)
    assert_agrees_with_oracle(x, weight, thresholds, y, bits)
    assert bits == pytest.approx(8)


def test_an_outlier_does_not_drown_its_group():
    """Every channel is read in full, because the rounding errors of x then have most terms."""
    x, weight, _ = Case(128, 512).arrays()
    x[0, 5] = 1000
    thresholds = np.zeros((1, 4), np.float32)
    assert_agrees_with_oracle(x, weight, thresholds, *emulate(x, weight, thresholds, DEFAULT_CONFIG))


def test_unreached_thresholds_read_nothing_and_give_zero():
    x, weight, _ = Case(256, 512, rows=2).arrays()
    y, bits = emulate(x, weight, np.full((2, 4), np.inf, np.float32), DEFAULT_CONFIG)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(bits, 0)


@pytest.mark.parametrize("reached", [0, 7, 8, 9, 24, 25, 57, 128])
@pytest.mark.parametrize("slots", [2, 4, 8])
def test_lists_of_any_length(reached, slots):
    """Plane 0, which is copied first, has more whole steps than the ring has slots, as many, fewer, or none.

    K fills whole CTAs, so the program checks no channel for padding.
    """
    config = Config(warpgroups=1, warps_per_group=1, ring_slots=slots)
    x, weight, _ = Case(512, 512, config=config).arrays()
    rng = np.random.default_rng(reached)
    for group in np.split(x[0], 4):
        order = rng.permutation(128)
        group[order] = np.sign(group[order]) * np.where(np.arange(128) < reached, 2.0, 0.5)
        group[order[: reached // 3]] *= 4
    thresholds = np.asarray([[1, 4, 8, 9]], np.float32)
    y, bits = emulate(x, weight, thresholds, config)
    assert bits == pytest.approx(2 * (reached + 2 * (reached // 3)) / 128)
    assert_agrees_with_oracle(x, weight, thresholds, y, bits)


def test_a_value_equal_to_the_threshold_reaches_it():
    x, weight, _ = Case(256, 512).arrays()
    x = np.where(np.arange(256) < 64, np.float32(1), 0)[None]
    thresholds = np.asarray([[0.5, 1, 1.0000001, 2]], np.float32)
    y, bits = emulate(x, weight, thresholds, DEFAULT_CONFIG)
    assert bits == pytest.approx(2 * 2 * 64 / 256)
    assert_agrees_with_oracle(x, weight, thresholds, y, bits)


def test_config_errors_name_the_field_and_the_allowed_values():
    with pytest.raises(ValueError, match=r"Config.ring_slots must be one of \(2, 4, 8, 16\), not 3"):
        Config(warpgroups=1, warps_per_group=1, ring_slots=3)
