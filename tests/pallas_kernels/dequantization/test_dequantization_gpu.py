"""The dequantization kernel on a GPU (``pytest -m gpu``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dequantization import exact, random_weight

from pallas_kernels import dequantization

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "size", [(128, 512), (1000, 1000), (576, 576), (1536, 960), (4096, 6144), (14336, 4096)], ids=str
)
def test_equals_the_definition(size, planes):
    weight = jax.tree.map(jnp.asarray, random_weight(*size, planes))
    assert dequantization.supports(weight, jnp.bfloat16) is None
    dense = jax.jit(dequantization.dequantize_to_bfloat16)(weight)
    np.testing.assert_array_equal(dense, exact(weight))
