"""The lane program of the products of experts on the emulator, against the float64 oracle."""

import dataclasses

import numpy as np
import pytest
from emulation import emulate, emulate_experts
from experts_cases import ExpertsCase, assert_agrees_with_oracle
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from pallas_kernels.experts.mosaic_gpu import ExpertsGeometry
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.matvec.mosaic_gpu import Config
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs, lane_context, weight_address

CONFIG = Config(warpgroups=1, warps_per_group=4, ring_slots=4)

cases = st.builds(
    ExpertsCase,
    in_features=st.integers(1, 400),
    out_features=st.sampled_from([1, 64, 100, 200, 500, 512, 576, 700, 1000]),
    rows=st.integers(1, 5),
    num_experts=st.integers(1, 4),
    max_bits=st.sampled_from([2, 4, 6, 8]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    activations=st.sampled_from(["gaussian", "outliers", "zeros", "all-zero"]),
    config=st.builds(
        Config,
        warpgroups=st.sampled_from([1, 2]),
        warps_per_group=st.sampled_from([1, 2, 4]),
        ring_slots=st.sampled_from([2, 4, 8]),
    ),
    seed=st.integers(0, 2**32 - 1),
)


@given(case=cases)
@examples(16, in_ci=200)
def test_agrees_with_float64(case):
    x, weight, experts, thresholds = case.arrays()
    y, bits = emulate_experts(x, weight, experts, thresholds, case.config)
    assert_agrees_with_oracle(x, weight, experts, thresholds, y, bits)


def test_rows_have_the_bits_of_the_dense_product_with_their_expert():
    """Rows 0 and 3 share an expert, and one expert has no row."""
    case = ExpertsCase(300, 700, rows=4, num_experts=4, config=CONFIG)
    x, weight, _, thresholds = case.arrays()
    experts = np.array([2, 0, 3, 2])
    y, bits = emulate_experts(x, weight, experts, thresholds, CONFIG)
    for row, expert in enumerate(experts):
        one = slice(row, row + 1)
        alone = emulate(x[one], weight.expert(int(expert)), thresholds[one], CONFIG)
        np.testing.assert_array_equal(y[one], alone[0])
        np.testing.assert_array_equal(bits[one], alone[1])


def test_experts_without_rows_are_not_read():
    case = ExpertsCase(256, 512, rows=3, num_experts=3, config=CONFIG)
    x, weight, _, thresholds = case.arrays()
    damaged = dataclasses.replace(weight, scales=weight.scales.copy())
    damaged.scales[1] = np.inf
    y, damaged_y = (emulate_experts(x, w, [0, 2, 0], thresholds, CONFIG)[0] for w in (weight, damaged))
    np.testing.assert_array_equal(y, damaged_y)


def test_applies_the_factor_of_a_norm_to_each_row():
    case = ExpertsCase(200, 100, rows=3, num_experts=2, config=CONFIG)
    x, weight, experts, thresholds = case.arrays()
    squares = np.asarray([[1, 2, 0.75], [0.25, 0.5, 0], [0, 0, 0]], np.float32)
    y, bits = emulate_experts(x, weight, experts, thresholds, CONFIG, squares, eps=0.25)
    normed = (x * np.asarray([[0.5], [1], [2]])).astype(np.float32)
    assert_agrees_with_oracle(normed, weight, experts, thresholds, y, bits)


@pytest.mark.parametrize("experts", [[0, 127], [128, 1023]])
def test_offsets_of_experts_have_64_bits(experts):
    """The experts have 64 MiB each, so those from 64 on begin beyond 4 GiB."""
    k, n = 8192, 8192
    geometry = ExpertsGeometry(
        in_features=k, stored_k=k, stored_n=n, planes=4, rows=2, x_dtype="float32", config=CONFIG
    )
    isa = NumpyInstructions(blocks=geometry.blocks, threads=geometry.threads, shared_bytes=64)
    indices, planes = isa.array(np.asarray(experts, np.int32)), isa.array(np.zeros(4, np.uint8))
    refs = Refs(*[None] * 4, planes, *[None] * 4, experts=indices)
    with isa.when(isa.block_index() < geometry.matvec_blocks):
        context = lane_context(isa, geometry, refs)
        expert_bytes = geometry.planes * geometry.plane_bytes
        address = weight_address(isa, planes, context, expert_bytes)
    # Over the grid the row varies fastest.
    offsets = (address - isa.global_address(planes)).data.reshape(geometry.blocks, -1)[:2, 0]
    assert expert_bytes == k * n
    np.testing.assert_array_equal(offsets, np.asarray(experts, np.int64) * k * n)


def test_rows_of_a_token_share_its_activations_and_thresholds():
    """Two sequences of one token with three experts each."""
    case = ExpertsCase(200, 100, rows=6, num_experts=4, config=CONFIG)
    x, weight, experts, thresholds = case.arrays()
    squares = np.random.default_rng(1).uniform(0.5, 2, (6, 1)).astype(np.float32)
    shared = emulate_experts(x[::3], weight, experts, thresholds[::3], CONFIG, squares, repeats=3)
    x, thresholds = (np.repeat(a[::3], 3, axis=0) for a in (x, thresholds))
    copied = emulate_experts(x, weight, experts, thresholds, CONFIG, squares)
    for array, expected in zip(shared, copied, strict=True):
        np.testing.assert_array_equal(array, expected)
