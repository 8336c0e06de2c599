"""The lane program of the router on the emulator, against float64."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from router_cases import RouterCase, assert_agrees_with_oracle

from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.router.geometry import CLUSTER
from pallas_kernels.router.program import RouterRefs, router_program

cases = st.builds(
    RouterCase,
    rows=st.integers(1, 3),
    features=st.integers(1, 80).map(lambda n: 8 * n),
    experts=st.sampled_from([2, 8, 30, 60, 64, 100, 128, 256, 512]),
    chosen=st.sampled_from([1, 2, 8]),
    normalized=st.booleans(),
    num_square_partials=st.sampled_from([0, 1, 4, 37]),
    biased=st.booleans(),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    seed=st.integers(0, 2**32 - 1),
).filter(lambda case: case.chosen <= case.experts)


def emulate(case: RouterCase, x, squares, kernel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns experts, probabilities and mean squares; fails if the program leaves one unwritten."""
    g = case.geometry
    isa = NumpyInstructions(blocks=g.blocks, threads=g.threads, shared_bytes=g.shared_bytes, cluster=CLUSTER)
    shape, unwritten = (g.rows, g.chosen), 12345.678
    experts = np.full(shape, -1, np.int32)
    probabilities, means = (np.full(shape, unwritten, np.float32) for _ in range(2))
    squares = np.zeros((g.rows, 1), np.float32) if squares is None else squares
    arrays = x, squares, kernel, experts, probabilities, means
    bias = None if case.bias is None else isa.array(case.bias)
    router_program(isa, g, RouterRefs(*(isa.array(a) for a in arrays), shared=None, bias=bias))
    isa.finish()
    assert ((experts >= 0) & (experts < g.experts)).all()
    assert not (probabilities == np.float32(unwritten)).any()
    assert not (means == np.float32(unwritten)).any()
    return experts, probabilities, means


@given(case=cases)
@examples(16, in_ci=200)
def test_agrees_with_float64(case):
    arrays = case.arrays()
    assert_agrees_with_oracle(case, arrays, *emulate(case, *arrays))


@pytest.mark.parametrize(
    "case",
    [
        RouterCase(2, 2048, 128, 8),
        RouterCase(1, 2048, 60, 4, normalized=False),
        RouterCase(1, 4096, 8, 2),
        RouterCase(1, 2880, 32, 4, biased=True),
        RouterCase(1, 2880, 128, 4, biased=True),
    ],
    ids=["Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B", "Mixtral-8x7B", "gpt-oss-20b", "gpt-oss-120b"],
)
def test_published_shapes(case):
    arrays = case.arrays()
    assert_agrees_with_oracle(case, arrays, *emulate(case, *arrays))


def test_equal_scores_are_in_the_order_of_the_experts():
    """All experts of the first row have the score 0, in the second row half have the same large one."""
    case = RouterCase(2, 64, 128, 8, num_square_partials=0)
    x = np.zeros((2, 64), ml_dtypes.bfloat16)
    x[1] = 1
    kernel = np.zeros((64, 128), ml_dtypes.bfloat16)
    kernel[:, 1::2] = 1
    kernel[:, 0::4] = -kernel[:, 0::4]  # products of -0 are not below those of 0
    experts, probabilities, _ = emulate(case, x, None, kernel)
    np.testing.assert_array_equal(experts, [np.arange(8), np.arange(1, 16, 2)])
    np.testing.assert_array_equal(probabilities, np.full((2, 8), 0.125))


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_choose_experts_that_exist(number):
    case = RouterCase(2, 64, 60, 8)
    x, squares, kernel = case.arrays()
    x[0, 3] = number
    experts, probabilities, _ = emulate(case, x, squares, kernel)
    assert len(set(experts[0])) == 8
    assert np.isnan(probabilities[0]).all()
    whole = dataclasses.replace(case, rows=1)
    assert_agrees_with_oracle(whole, (x[1:], squares[1:], kernel), experts[1:], probabilities[1:], _[1:])


def test_rows_do_not_depend_on_other_rows():
    case = RouterCase(3, 200, 60, 4)
    x, squares, kernel = case.arrays()
    together = emulate(case, x, squares, kernel)
    one = dataclasses.replace(case, rows=1)
    for row in range(3):
        alone = emulate(one, x[row : row + 1], squares[row : row + 1], kernel)
        for array, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(array[row], expected[0])
