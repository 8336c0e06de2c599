"""The product at one level on a GPU (``pytest -m gpu``)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matvec_cases import Case
from test_matmul_program import EXACT, ROUNDED, assert_agrees

from pallas_kernels import level_matmul
from pallas_kernels.matmul.mosaic_gpu import kernel

pytestmark = pytest.mark.gpu

SIZES = [(300, 700), (576, 960), (384, 1024), (4096, 6144)]


@pytest.fixture(autouse=True)
def _gpu():
    if jax.default_backend() != "gpu":
        pytest.fail("these tests need an NVIDIA GPU")


QUICK = [
    ((300, 700), 1, 4),
    ((300, 700), 32, 2),
    ((576, 960), 16, 3),
    ((384, 1024), 64, 1),
    *(((4096, 6144), rows, level) for rows, level in ((16, 4), (32, 3), (64, 4), (64, 2), (256, 3))),
]
"""Every value of every parameter, and the largest size at the levels and rows of decode steps."""

ALL = itertools.product(SIZES, (1, 16, 32, 64, 256), (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("size", "rows", "level"),
    QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK],
    ids=str,
)
def test_agrees_with_float64_and_with_itself(size, rows, level):
    x, weight, _ = Case(*size, rows=rows, dtype="bfloat16", activations="heavy", seed=rows).arrays()
    run = jax.jit(lambda x, weight: level_matmul(x, weight, level, implementation="mosaic_gpu"))
    y = np.asarray(run(jnp.asarray(x), weight))
    assert_agrees(x, weight, level, y, ROUNDED if rows > 64 else EXACT)
    np.testing.assert_array_equal(y, run(jnp.asarray(x), weight))


@pytest.mark.parametrize(
    ("size", "rows", "level", "rounded"),
    [((576, 960), 33, 2, ROUNDED), ((1100, 1100), 130, 3, EXACT)],
    ids=str,
)
def test_the_other_way_agrees_with_float64(size, rows, level, rounded):
    x, weight, _ = Case(*size, rows=rows, dtype="bfloat16", activations="heavy", seed=rows).arrays()
    y = np.asarray(
        jax.jit(lambda x, weight: kernel.matmul(x, weight, level, rounded))(jnp.asarray(x), weight)
    )
    assert_agrees(x, weight, level, y, rounded)
