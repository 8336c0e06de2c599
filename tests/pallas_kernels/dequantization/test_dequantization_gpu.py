"""The dequantization kernel on a GPU (``pytest -m gpu``)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dequantization import exact, experts_of, random_weight

from pallas_kernels import dequantization

pytestmark = pytest.mark.gpu


SIZES = [(128, 512), (1000, 1000), (576, 576), (1536, 960), (4096, 6144), (14336, 4096)]
QUICK = [((128, 512), 1), ((1000, 1000), 2), ((576, 576), 3), ((1536, 960), 4), ((4096, 6144), 4)]


@pytest.mark.parametrize(
    ("size", "planes"),
    QUICK
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(SIZES, (1, 2, 3, 4))
        if case not in QUICK
    ],
    ids=str,
)
def test_equals_the_definition(size, planes):
    weight = jax.tree.map(jnp.asarray, random_weight(*size, planes))
    assert dequantization.supports(weight, jnp.bfloat16) is None
    dense = jax.jit(dequantization.dequantize_to_bfloat16)(weight)
    np.testing.assert_array_equal(dense, exact(weight))


@pytest.mark.parametrize(
    ("size", "planes", "experts"), [((301, 1000), 3, 5), ((2048, 1536), 4, 128), ((768, 2048), 4, 8)], ids=str
)
def test_all_experts_equal_the_definition(size, planes, experts):
    """The first and the last experts are compared; 128 of them have 402 MB of planes."""
    weights = [random_weight(*size, planes, seed) for seed in range(3)]
    stacked = experts_of([weights[i % 3] for i in range(experts)])
    dense = jax.jit(dequantization.dequantize_to_bfloat16)(jax.tree.map(jnp.asarray, stacked))
    for i in {0, 1, 2, experts - 2, experts - 1}:
        np.testing.assert_array_equal(dense[i], exact(weights[i % 3]))
