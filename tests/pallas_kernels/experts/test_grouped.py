"""The launch that multiplies many rows with the kernels of their experts, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.experts import grouped
from pallas_kernels.experts.grouped import Tiling
from pallas_kernels.lanes import device

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2"
)

DISTRIBUTIONS = {
    "uneven": [3, 0, 3, 2, 3, 3, 2, 3, 0, 3],
    "whole blocks": [1] * 64 + [3] * 128 + [0] * 64,
    "rows outside of the group": [4, 1, 4, 0, 0, 4, 4, 1] + [3] * 70,
    "all rows outside": [4] * 9,
}
"""Expert of each row, of four. Rows of expert 4 get zeros."""


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("block", [3, 64])
def test_each_row_has_one_place_in_a_block_of_its_expert(distribution, block):
    experts = np.array(DISTRIBUTIONS[distribution])
    grouping = jax.tree.map(np.asarray, jax.jit(grouped.group, static_argnums=(1, 2))(experts, 4, block))
    rows = np.flatnonzero(experts < 4)
    places = grouping.places[rows]
    assert len(set(places)) == len(rows)
    np.testing.assert_array_equal(grouping.sources[places], rows)
    np.testing.assert_array_equal(grouping.block_experts[places // block], experts[rows])
    (used,) = grouping.used
    assert set(places // block) == set(range(used))
    assert used == sum(-(-np.count_nonzero(experts == expert) // block) for expert in range(4))
    assert used <= len(grouping.block_experts) == len(grouping.sources) // block


@needs_mosaic
@pytest.mark.parametrize(
    ("distribution", "transposed"),
    [
        pytest.param("whole blocks", False, marks=pytest.mark.slow),
        ("rows outside of the group", True),
        ("all rows outside", False),
    ],
)
def test_products_equal_numpy(distribution, transposed):
    """Four steps of channels go through a pipeline of three, and 192 outputs are three tiles."""
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

    experts, rng = np.array(DISTRIBUTIONS[distribution]), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((len(experts), 256)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((4, 256, 192)), jnp.bfloat16)
    stored = kernel.transpose(0, 2, 1) if transposed else kernel
    options = {"sizes": Tiling(64, 64, 3), "interpret": InterpretGPUParams()}
    y = grouped.grouped_product(x, stored, jnp.asarray(experts), 4, transposed, **options)
    kernels = np.concatenate([np.asarray(kernel, np.float64), np.zeros((1, 256, 192))])
    expected = np.einsum("rk,rkn->rn", np.asarray(x, np.float64), kernels[experts])
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@needs_mosaic
@pytest.mark.parametrize(
    ("shape", "rows", "transposed"),
    [
        ((128, 2048, 1536), 4096, False),
        ((8, 28672, 4096), 4096, False),
        ((32, 2880, 5760), 16384, True),
        ((5, 64, 192), 129, False),
    ],
)
def test_lowers_for_an_h200_to_one_launch(shape, rows, transposed):
    """Experts of Qwen3-30B-A3B, Mixtral-8x7B and gpt-oss-20b, and small ones."""
    num_experts, channels, outputs = shape
    stored = (num_experts, outputs, channels) if transposed else shape
    x = jax.ShapeDtypeStruct((rows, channels), jnp.bfloat16)
    kernel, experts = jax.ShapeDtypeStruct(stored, jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.int32)
    with compiling_for("NVIDIA H200"):
        assert grouped.supports(x, kernel, transposed) is None
        product = jax.jit(grouped.grouped_product, static_argnums=(3, 4))
        traced = product.trace(x, kernel, experts, num_experts, transposed)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "stablehlo.while" not in text


@needs_mosaic
@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "reason"),
    [
        ("NVIDIA H100 PCIe", "bfloat16", (4, 128, 192), None),
        ("NVIDIA B200", "bfloat16", (4, 128, 192), "needs compute capability 9.0"),
        ("NVIDIA H200", "float32", (4, 128, 192), "multiplies bfloat16, not float32 by float32"),
        ("NVIDIA H200", "bfloat16", (4, 96, 192), "channels and outputs, not 96 and 192"),
        ("NVIDIA H200", "bfloat16", (4, 128, 200), "channels and outputs, not 128 and 200"),
    ],
)
def test_declines_with_a_reason(kind, dtype, shape, reason):
    with compiling_for(kind):
        arguments = jax.ShapeDtypeStruct((300, shape[1]), dtype), jax.ShapeDtypeStruct(shape, dtype)
        given = grouped.supports(*arguments)
    assert given is None if reason is None else reason in given


def compiling_for(kind):
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    return jax.sharding.use_abstract_mesh(mesh)
