"""The matvec kernel on a GPU (``pytest -m gpu``), alone and inside a larger program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from matvec_cases import Case, assert_agrees_with_oracle

from pallas_kernels import Activations, graded_matvec, graded_partial_sums
from pallas_kernels.lanes import device
from pallas_kernels.matvec.mosaic_gpu import BytePairs, Config, DenseRows, kernel

pytestmark = pytest.mark.gpu

CONFIGS = [
    Config(warpgroups=g, warps_per_group=w, ring_slots=s)
    for g, w, s in [(1, 1, 4), (1, 4, 2), (2, 2, 8), (2, 4, 16)]
]
ACTIVATIONS = ("outliers", "heavy", "zeros", "all-zero")
CASES = [
    *(Case(384, 1024, config=config, seed=i) for i, config in enumerate(CONFIGS)),
    *(Case(384, 1024, rows=rows, config=CONFIGS[rows % 2]) for rows in (2, 3, 5, 8)),
    *(Case(300, 700, rows=3, max_bits=bits, seed=bits) for bits in (2, 4, 6)),
    *(Case(301, 515, rows=2, dtype=dtype) for dtype in ("bfloat16", "float16")),
    *(Case(300, 512 * (p % 2) + 64 * p, config=CONFIGS[p % 4], seed=p) for p in (1, 4, 7)),
    Case(576, 960, config=None, rows=4),  # SmolLM2-135M
    Case(4096, 2304, config=None, activations="heavy"),
    Case(1024, 6144, config=None, rows=16),
    Case(8192, 2048, config=None, activations="outliers"),
    Case(1024, 151936, config=None, dtype="bfloat16"),
]
SLOW_CASES = [
    *(
        Case(384, 1024, rows=rows, config=CONFIGS[i])
        for i in range(2)
        for rows in range(1, 9)
        if rows in (1, 4, 6, 7) or rows % 2 != i
    ),
    Case(300, 700, rows=3, max_bits=8, seed=8),
    Case(301, 515, rows=2, dtype="float32"),
    *(Case(300, 512 * (p % 2) + 64 * p, config=CONFIGS[p % 4], seed=p) for p in (2, 3, 5, 6)),
    Case(64, 100, config=None),
    *(Case(576, n, config=None, rows=rows) for n, rows in ((576, 1), (576, 4), (960, 1))),
    Case(1536, 576, config=None, dtype="bfloat16"),
    Case(256, 512, config=None),
    *(Case(1024, 6144, config=None, rows=rows) for rows in (8, 16)),
    Case(3072, 8192, config=None, activations="heavy"),
    Case(5120, 13824, config=None, dtype="bfloat16"),
]


def dense_case(k, n, config=CONFIGS[1], tuning=DenseRows(), **fields) -> Case:  # noqa: B008
    return Case(k, n, config=dataclasses.replace(config, dense_rows=tuning), **fields)


DENSE_CASES = [
    *(dense_case(384, 1024, CONFIGS[rows % 4], rows=rows, seed=rows) for rows in (2, 3, 4, 7, 8, 13, 16)),
    dense_case(300, 700, CONFIGS[0], DenseRows(ring_slots=4), rows=3, max_bits=2),
    dense_case(300, 700, CONFIGS[0], DenseRows(step_planes=1, tiles=2), rows=16, max_bits=4),
    dense_case(300, 700, CONFIGS[1], DenseRows(step_planes=4, ring_slots=2), rows=9, max_bits=6),
    dense_case(300, 700, CONFIGS[1], DenseRows(ring_slots=4, tiles=2, counting_ctas=1), rows=4),
    *(dense_case(300, 512 * (p % 2) + 64 * p, CONFIGS[p % 4], rows=2 * p, seed=p) for p in range(1, 8)),
    dense_case(576, 960, CONFIGS[0], DenseRows(tiles=2), rows=8),
    dense_case(300, 700, CONFIGS[1], DenseRows(warpgroups=True), rows=9, max_bits=6),
    dense_case(384, 1024, CONFIGS[2], DenseRows(warpgroups=True, tiles=2, ring_slots=4), rows=13, seed=3),
    dense_case(576, 1100, CONFIGS[0], DenseRows(warpgroups=True, step_planes=4, ring_slots=2), rows=16),
]


def byte_pair_case(k, n, config, tuning=BytePairs(), **fields) -> Case:  # noqa: B008
    return Case(k, n, config=dataclasses.replace(config, byte_pairs=tuning), **fields)


BYTE_PAIR_CASES = [
    *(
        byte_pair_case(384, 1024, config, BytePairs(ring_slots=slots), rows=rows, seed=rows)
        for rows, config in [(2, CONFIGS[2]), (3, CONFIGS[0]), (4, CONFIGS[3]), (7, CONFIGS[1])]
        for slots in (4, 8)
    ),
    *(
        byte_pair_case(
            300,
            512 * (p % 2) + 64 * p,
            CONFIGS[p % 4],
            BytePairs(ring_slots=4 + 4 * (p % 2)),
            rows=max(p, 2),
            seed=p,
        )
        for p in range(1, 8)
    ),
]


@pytest.fixture(autouse=True)
def _gpu():
    if jax.default_backend() != "gpu":
        pytest.fail("these tests need an NVIDIA GPU")


QUICK_OTHER_CASES = [
    *(DENSE_CASES[i] for i in (1, 6, 7, 10, 13, -2)),
    *(BYTE_PAIR_CASES[i] for i in (1, 6, 10)),
]
SLOW_OTHER_CASES = [case for case in DENSE_CASES + BYTE_PAIR_CASES if case not in QUICK_OTHER_CASES]
CONTENTS = [
    Case(1000, 600, rows=2, seed=7),
    dense_case(1000, 600, CONFIGS[2], rows=12),
    byte_pair_case(1000, 600, CONFIGS[2], BytePairs(ring_slots=8), rows=4),
]
"""Cases that run with each kind of activations, one program for all."""


@functools.partial(jax.jit, static_argnames="config")
def partials_and_stats(x, squares, weight, thresholds, config):
    y, stats = kernel.partial_sums(Activations.of(x, squares, eps=1e-6), weight, thresholds, config=config)
    return y.partials, stats.packed


def assert_agrees_and_repeats(case: Case) -> None:
    """Compares with float64, and a second run bit for bit."""
    x, weight, thresholds = case.arrays()
    assert kernel.supports(x, weight) is None
    y, stats = map(np.asarray, partials_and_stats(x, None, weight, thresholds, config=case.config))
    total = np.asarray(y, np.float64).sum(0)[:, : case.out_features]
    assert_agrees_with_oracle(x, weight, thresholds, total, stats[:, 0])
    np.testing.assert_array_equal(stats[:, 1], np.abs(x.astype(np.float32)).max(1))
    again, _ = partials_and_stats(x, None, weight, thresholds, config=case.config)
    np.testing.assert_array_equal(y, np.asarray(again))


def assert_rows_have_the_bits_of_the_row_alone(case: Case) -> None:
    """Compares the program of ``case`` with that of one row, with and without the factor of a norm."""
    assert case.config is not None
    dense_rows = case.config.dense_rows
    if dense_rows and dense_rows.warpgroups and (reason := device.no_warpgroup_products_reason()):
        pytest.skip(reason)
    x, weight, thresholds = case.arrays()
    squares = np.random.default_rng(case.seed).uniform(0, 1, (case.rows, 3)).astype(np.float32)
    one_row = dataclasses.replace(case.config, byte_pairs=None, dense_rows=None)
    for factor in (None, squares):
        together = partials_and_stats(x, factor, weight, thresholds, config=case.config)
        again = partials_and_stats(x, factor, weight, thresholds, config=case.config)
        for row in range(case.rows):
            one = slice(row, row + 1)
            factor_of_one = None if factor is None else factor[one]
            alone = partials_and_stats(x[one], factor_of_one, weight, thresholds[one], config=one_row)
            for a, b, c in zip(together, again, alone, strict=True):
                a, b, c = (np.asarray(v).view(np.uint32) for v in (a, b, c))
                np.testing.assert_array_equal(a, b)
                np.testing.assert_array_equal(a[..., row, :], c[..., 0, :])


@pytest.mark.parametrize("case", [*CASES, *slow(*SLOW_CASES)], ids=str)
def test_agrees_with_float64(case):
    assert_agrees_and_repeats(case)


@pytest.mark.parametrize("case", CONTENTS, ids=str)
def test_agrees_for_every_kind_of_activations(case):
    for activations in ACTIVATIONS:
        one = dataclasses.replace(case, activations=activations)
        assert_agrees_and_repeats(one)
        if one.config != Case.config:
            assert_rows_have_the_bits_of_the_row_alone(one)


@pytest.mark.parametrize("case", [*QUICK_OTHER_CASES, *slow(*SLOW_OTHER_CASES)], ids=str)
def test_rows_of_other_programs_agree_with_float64_and_have_the_bits_of_the_row_alone(case):
    assert_agrees_and_repeats(case)
    assert_rows_have_the_bits_of_the_row_alone(case)


def test_many_rows_have_the_bits_of_the_row_alone():
    x, weight, thresholds = jax.tree.map(jnp.asarray, Case(640, 1100, rows=45).arrays())
    squares = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, (45, 3)), jnp.float32)

    @jax.jit
    def run(x, squares, thresholds):
        y, stats = kernel.partial_sums(Activations.of(x, squares, eps=1e-6), weight, thresholds)
        return y.array, stats.packed

    together = run(x, squares, thresholds)
    for row in (0, 15, 16, 31, 32, 44):
        one = slice(row, row + 1)
        for a, b in zip(together, run(x[one], squares[one], thresholds[one]), strict=True):
            np.testing.assert_array_equal(np.asarray(a[one]).view(np.uint32), np.asarray(b).view(np.uint32))


def test_applies_the_factor_of_a_norm():
    """The factors 1/2, 1 and 2 are exact, so multiplied activations have the same levels."""
    x, weight, thresholds = Case(300, 512, rows=3).arrays()
    squares = np.asarray([[1, 2, 0.75], [0.25, 0.5, 0], [0, 0, 0]], np.float32)
    normed = (x.astype(np.float32) * [[0.5], [1], [2]]).astype(x.dtype)
    inputs = Activations.of(jnp.asarray(x), jnp.asarray(squares), eps=0.25)
    y, stats = graded_partial_sums(inputs, weight, thresholds, implementation="mosaic_gpu")
    expected, expected_bits = graded_matvec(normed, weight, thresholds, implementation="mosaic_gpu")
    np.testing.assert_allclose(y.array, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.bits, expected_bits, atol=0.02)
    np.testing.assert_allclose(stats.max_abs, np.abs(normed.astype(np.float32)).max(1), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(bad):
    x, weight, thresholds = Case(384, 1024, rows=3).arrays()
    clean, _ = graded_matvec(x, weight, thresholds, implementation="mosaic_gpu")
    x[1, 200] = bad
    y, _ = graded_matvec(x, weight, thresholds, implementation="mosaic_gpu")
    assert not np.isfinite(np.asarray(y[1])).any()
    np.testing.assert_allclose(np.asarray(y)[[0, 2]], np.asarray(clean)[[0, 2]], atol=1e-4)


def test_default_runs_in_a_while_loop_without_copying_weights():
    x, weight, thresholds = Case(512, 512).arrays()
    x = jnp.asarray(x / 30)

    def three_times(x, weight, thresholds, **options):
        def step(carry):
            i, x = carry
            return i + 1, jnp.tanh(graded_matvec(x, weight, thresholds, **options)[0])

        return jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]

    compiled = jax.jit(three_times).lower(x, weight, thresholds).compile()
    text = compiled.as_text()
    assert "mosaic_gpu" in text
    copies = [line for line in text.splitlines() if " copy(" in line and "u32[4,512,32]" in line]
    assert not copies, copies
    expected = three_times(x, weight, thresholds, implementation="reference")
    np.testing.assert_allclose(np.asarray(compiled(x, weight, thresholds)), np.asarray(expected), atol=1e-2)
