"""The launch of the router: choice, results in the decoder, and lowering for GPUs that are absent."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from pallas_kernels import Activations, router
from pallas_kernels.lanes import device

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2"
)

SHAPES = [
    *[(2048, 128, 8), (4096, 128, 8), (4096, 8, 2), (2048, 60, 4), (2048, 64, 8), (2048, 512, 10)],
    *[(2880, 32, 4), (2880, 128, 4)],
]
"""Features, experts and chosen experts of Qwen3-30B-A3B, Qwen3-235B-A22B, Mixtral-8x7B, Qwen1.5-MoE-A2.7B,
OLMoE-1B-7B, Qwen3-Next-80B-A3B, gpt-oss-20b and gpt-oss-120b."""


def compiling_for(kind: str):
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    return jax.sharding.use_abstract_mesh(mesh)


def abstract(rows: int, features: int, experts: int, dtype="bfloat16", kernel_dtype="bfloat16"):
    x = jax.eval_shape(Activations.of, jax.ShapeDtypeStruct((rows, 1, features), dtype))
    return x, jax.ShapeDtypeStruct((features, experts), kernel_dtype)


@needs_mosaic
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rows", "kernel_dtype"), [(1, "bfloat16"), (16, "float32")])
@pytest.mark.parametrize("biased", [False, True])
def test_lowers_to_one_kernel(shape, rows, kernel_dtype, biased):
    features, experts, chosen = shape
    bias = jnp.ones(experts, kernel_dtype) if biased else None
    route = functools.partial(router.route, chosen=chosen, normalized=True, bias=bias)
    x, kernel = abstract(rows, features, experts, kernel_dtype=kernel_dtype)
    with compiling_for("NVIDIA H200"):
        assert router.supports(x, kernel, chosen) is None
        routed = jax.eval_shape(route, x, kernel)
        text = jax.jit(route).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "router_kernel" in text
    assert routed.experts.shape == routed.probabilities.shape == routed.inputs.leading == (rows, 1, chosen)
    assert routed.inputs.partials.size == rows * features  # x is not copied for each expert


@needs_mosaic
def test_declines_with_a_reason():
    with compiling_for("NVIDIA H200"):
        for arguments, reason in [
            ((*abstract(17, 2048, 128), 8), "takes 1 to 16 rows, not 17"),
            (
                (*abstract(1, 2048, 128, "float32"), 8),
                "takes bfloat16 activations, not 1 partial sums of float",
            ),
            ((*abstract(1, 2044, 128), 8), "takes a multiple of 8 up to 16384 features, not 2044"),
            ((*abstract(1, 2048, 1024), 8), "takes an even number of up to 512 experts, not 1024"),
            ((*abstract(1, 2048, 15), 8), "takes an even number of up to 512 experts, not 15"),
            ((*abstract(1, 2048, 128), 33), "chooses at most 32 experts, not 33"),
            ((*abstract(1, 2048, 128, kernel_dtype="float16"), 8), "bfloat16 or float32, not float16"),
        ]:
            assert reason in router.supports(*arguments)


def test_a_cpu_has_no_clusters():
    assert router.supports(*abstract(1, 2048, 128), 8) is not None
