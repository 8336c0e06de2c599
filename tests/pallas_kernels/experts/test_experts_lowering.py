"""The launch of the experts kernel: choice, tuning, and lowering for GPUs that are absent."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from pallas_kernels import Activations
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.experts import choose, experts_matvec, mosaic_gpu
from pallas_kernels.lanes import device
from pallas_kernels.matvec.mosaic_gpu.geometry import SHARED_BYTES_LIMIT

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2"
)

SHAPES = [
    *[(128, 2048, 1536), (128, 768, 2048), (8, 4096, 28672)],
    *[(32, 2880, 5760), (32, 2880, 2880), (3, 300, 700)],
]
"""Experts of Qwen3-30B-A3B (gate and up, down), of Mixtral-8x7B and of gpt-oss-20b, and narrow ones."""


def compiling_for_an_h200():
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    return jax.sharding.use_abstract_mesh(mesh)


def abstract_x(rows: int, features: int, dtype="bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, features), dtype)


@needs_mosaic
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "max_bits", "dtype"), [(1, 4, "float32"), (8, 8, "bfloat16"), (128, 8, "bfloat16")]
)
def test_lowers_to_one_kernel_without_gathers(shape, rows, max_bits, dtype):
    weight, x = NestedExperts.abstract(*shape, max_bits), abstract_x(rows, shape[1], dtype)

    def product(x, weight, experts, thresholds):
        y, stats = experts_matvec(Activations.of(x), weight, experts, thresholds)
        return y.partials, stats

    with compiling_for_an_h200():
        assert choose(x, weight) == "mosaic_gpu"
        experts = jax.ShapeDtypeStruct((rows,), jnp.int32)
        thresholds = jax.ShapeDtypeStruct((max_bits // 2,), jnp.float32)
        traced = jax.jit(product).trace(x, weight, experts, thresholds)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "graded_experts_kernel" in text
    for operation in ("gather", "dynamic_slice", "while"):
        assert f"stablehlo.{operation}" not in text


@needs_mosaic
def test_declines_with_a_reason():
    weight = NestedExperts.abstract(8, 256, 512)
    with compiling_for_an_h200():
        assert mosaic_gpu.supports(abstract_x(8, 256), weight) is None
        assert mosaic_gpu.supports(abstract_x(129, 256), weight) == "takes 1 to 128 rows, not 129"
        assert choose(abstract_x(129, 256), weight) == "xla"
        # 8 GiB of planes, 64 MiB for each expert.
        assert mosaic_gpu.supports(abstract_x(8, 8192), NestedExperts.abstract(128, 8192, 8192)) is None
        huge = NestedExperts.abstract(2, 65536, 131072)
        assert "4294967296 bytes of planes of an expert" in mosaic_gpu.supports(abstract_x(8, 65536), huge)


def test_a_cpu_runs_xla_and_the_kernel_declines_with_a_reason():
    x, weight = abstract_x(8, 256), NestedExperts.abstract(8, 256, 512)
    assert choose(x, weight) == "xla"
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu: needs (an NVIDIA GPU|jax)"):
        choose(x, weight, "mosaic_gpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_configuration_does_not_depend_on_the_rows(shape):
    """The order of sums follows from the configuration, so a row has the same bits among any others."""
    weight = NestedExperts.abstract(*shape)
    with compiling_for_an_h200():
        launches = [
            mosaic_gpu.geometry_of(jax.eval_shape(Activations.of, abstract_x(rows, shape[1])), weight)
            for rows in (1, 8, 100, 128)
        ]
    assert len({launch.config for launch in launches}) == 1
    for launch in launches:
        assert launch.shared_bytes <= SHARED_BYTES_LIMIT
        assert launch.matvec_blocks == launch.rows * launch.tiles * launch.splits


def test_a_token_of_qwen3_30b_a3b_occupies_most_multiprocessors():
    for shape in SHAPES[:2]:
        weight, x = NestedExperts.abstract(*shape), jax.eval_shape(Activations.of, abstract_x(8, shape[1]))
        with compiling_for_an_h200():
            launch = mosaic_gpu.geometry_of(x, weight)
        assert launch.matvec_blocks >= 0.7 * 132
        one = dataclasses.replace(launch, rows=1)
        assert launch.matvec_blocks == 8 * one.matvec_blocks
