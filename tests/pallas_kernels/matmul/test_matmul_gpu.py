"""The product at one level on a GPU (``pytest -m gpu``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matvec_cases import Case
from test_matmul_program import assert_agrees

from pallas_kernels import level_matmul

pytestmark = pytest.mark.gpu

SIZES = [(300, 700), (576, 960), (384, 1024), (4096, 6144)]


@pytest.fixture(autouse=True)
def _gpu():
    if jax.default_backend() != "gpu":
        pytest.fail("these tests need an NVIDIA GPU")


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 16, 32, 64, 256])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_float64_and_with_itself(size, rows, level):
    x, weight, _ = Case(*size, rows=rows, dtype="bfloat16", activations="heavy", seed=rows).arrays()
    run = jax.jit(lambda x, weight: level_matmul(x, weight, level, implementation="mosaic_gpu"))
    y = np.asarray(run(jnp.asarray(x), weight))
    assert_agrees(x, weight, level, y)
    np.testing.assert_array_equal(y, run(jnp.asarray(x), weight))
