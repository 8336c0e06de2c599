"""The experts kernel on a GPU (``pytest -m gpu``), alone and inside a larger program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts_cases import ExpertsCase, assert_agrees_with_oracle
from marks import slow

from pallas_kernels import Activations, graded_partial_sums
from pallas_kernels.experts import experts_matvec, mosaic_gpu
from pallas_kernels.matvec.mosaic_gpu import Config
from pallas_kernels.matvec.mosaic_gpu import kernel as matvec_kernel

pytestmark = pytest.mark.gpu

CONFIGS = [
    Config(warpgroups=g, warps_per_group=w, ring_slots=s)
    for g, w, s in [(1, 1, 4), (1, 4, 2), (2, 2, 8), (2, 4, 16)]
]
ACTIVATIONS = ("outliers", "heavy", "zeros", "all-zero")
CASES = [
    *(ExpertsCase(384, 1024, 6, 5, config=config, seed=i) for i, config in enumerate(CONFIGS)),
    *(ExpertsCase(300, 700, 3, 4, max_bits=bits, seed=bits) for bits in (2, 6)),
    ExpertsCase(301, 515, 2, 2, dtype="float16"),
    ExpertsCase(768, 2048, 8, 16, dtype="bfloat16", activations="heavy"),
    ExpertsCase(2048, 1536, 1, 4),
    *slow(
        *(ExpertsCase(300, 700, 3, 4, max_bits=bits, seed=bits) for bits in (4, 8)),
        *(ExpertsCase(301, 515, 2, 2, dtype=dtype) for dtype in ("float32", "bfloat16")),
        ExpertsCase(2048, 1536, 8, 16, dtype="bfloat16"),
        ExpertsCase(768, 2048, 128, 16, dtype="bfloat16"),
    ),
]


@pytest.fixture(autouse=True)
def _gpu():
    if jax.default_backend() != "gpu":
        pytest.fail("these tests need an NVIDIA GPU")


@functools.partial(jax.jit, static_argnames="config")
def run(x, weight, experts, thresholds, config=None):
    return mosaic_gpu.partial_sums(Activations.of(x), weight, experts, thresholds, config=config)


def assert_agrees_and_repeats(case: ExpertsCase) -> None:
    """Compares with float64, and a second run bit for bit."""
    x, weight, experts, thresholds = case.arrays()
    y, stats = run(x, weight, experts, thresholds, case.config)
    assert_agrees_with_oracle(x, weight, experts, thresholds, np.asarray(y.array), np.asarray(stats.bits))
    np.testing.assert_array_equal(stats.max_abs, np.abs(x.astype(np.float32)).max(1))
    again, _ = run(x, weight, experts, thresholds, case.config)
    np.testing.assert_array_equal(np.asarray(y.partials), np.asarray(again.partials))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64_and_repeats(case):
    assert_agrees_and_repeats(case)


def test_agrees_for_every_kind_of_activations():
    for activations in ACTIVATIONS:  # one program
        assert_agrees_and_repeats(ExpertsCase(1000, 600, 4, 3, activations=activations))


def test_rows_have_the_bits_of_the_dense_product_with_their_expert():
    case = ExpertsCase(768, 2048, 8, 6, dtype="bfloat16")
    x, weight, experts, thresholds = case.arrays()
    together, _ = run(x, weight, experts, thresholds)
    config = mosaic_gpu.geometry_of(Activations.of(jnp.asarray(x)), weight).config
    dense = jax.jit(lambda x, w, t: matvec_kernel.partial_sums(Activations.of(x), w, t, config=config)[0])
    for row, expert in enumerate(experts):
        one = slice(row, row + 1)
        alone = dense(x[one], weight.expert(int(expert)), thresholds[one])
        np.testing.assert_array_equal(np.asarray(together.partials[:, one]), np.asarray(alone.partials))


def test_experts_beyond_4_gib_are_read():
    """The last of 80 experts of 64 MiB, which all but it are zeros."""
    k, n, count = 8192, 8192, 80
    x = np.random.default_rng(0).standard_normal((1, k)).astype(np.float32)
    case = dataclasses.replace(ExpertsCase(k, n, 1, 1), dtype="bfloat16")
    _, one, _, thresholds = case.arrays()

    def stacked(array):
        return jnp.zeros((count, *array.shape[1:]), array.dtype).at[-1].set(array[0])

    weight = dataclasses.replace(one, planes=stacked(one.planes), scales=stacked(one.scales))
    y, _ = run(x, weight, np.asarray([count - 1], np.int32), thresholds)
    expected, _ = jax.jit(lambda x, w, t: graded_partial_sums(Activations.of(x), w, t))(
        jnp.asarray(x), jax.tree.map(jnp.asarray, one.expert(0)), thresholds
    )
    np.testing.assert_allclose(y.array, expected.array, rtol=1e-3, atol=1e-3 * np.abs(y.array).max())


def test_default_runs_in_a_while_loop_with_experts_chosen_on_the_device():
    x, weight, _, thresholds = ExpertsCase(512, 512, 4, 6).arrays()
    x = jnp.asarray(x / 30)

    def three_times(x, weight, thresholds, **options):
        def step(carry):
            i, x = carry
            _, experts = jax.lax.top_k(x[:, :6], 1)
            y, _ = experts_matvec(Activations.of(x), weight, experts[:, 0], thresholds, **options)
            return i + 1, jnp.tanh(y.array)

        return jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]

    weight = jax.tree.map(jnp.asarray, weight)
    compiled = jax.jit(three_times).lower(x, weight, thresholds).compile()
    assert "mosaic_gpu" in compiled.as_text()
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and "u32[6,4,512" in line]
    assert not copies, copies
    expected = three_times(x, weight, thresholds, implementation="reference")
    np.testing.assert_allclose(np.asarray(compiled(x, weight, thresholds)), np.asarray(expected), atol=1e-2)
