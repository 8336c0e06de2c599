"""The programs for several rows: lowering for GPUs, and whether their CTAs fit."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from pallas_kernels import Activations, NestedWeight
from pallas_kernels.lanes import device
from pallas_kernels.matvec.mosaic_gpu import BytePairs, Config, DenseRows, kernel, tuning
from pallas_kernels.matvec.mosaic_gpu.geometry import SHARED_BYTES_LIMIT

GPUS = [
    ("NVIDIA H200", 132),
    ("NVIDIA GeForce RTX 4090", 128),
    ("NVIDIA B200", 148),
    ("NVIDIA GeForce RTX 5090", 170),
]
PAIRS = Config(warpgroups=2, warps_per_group=1, ring_slots=8, byte_pairs=BytePairs())
DENSE = Config(warpgroups=1, warps_per_group=1, ring_slots=8, dense_rows=DenseRows())
TILES = dataclasses.replace(DENSE, dense_rows=DenseRows(ring_slots=4, tiles=2))
LOWERED = {"pairs": (PAIRS, (2, 7)), "dense": (DENSE, (2, 16, 8)), "tiles": (TILES, (2, 16, 8))}
"""Configurations, and the numbers of rows that they are lowered for."""
SHAPES = {2: (4096, 6144, 8), 7: (300, 700, 6), 16: (300, 700, 6), 8: (576, 320, 8)}
"""Input features, output features and bits, by the number of rows."""


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2")
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu[0])
@pytest.mark.parametrize(("name", "rows"), [(name, n) for name, (_, rows) in LOWERED.items() for n in rows])
def test_lowers_for(gpu, name, rows):
    config, (*shape, max_bits) = LOWERED[name][0], SHAPES[rows]
    arguments = (
        jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16),
        NestedWeight.abstract(*shape, max_bits),
        jax.ShapeDtypeStruct((rows, max_bits // 2), jnp.float32),
    )
    kind, multiprocessors = gpu
    absent = jax.sharding.AbstractDevice(device_kind=kind, num_cores=multiprocessors, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=absent)
    product = jax.jit(
        lambda x, weight, thresholds: kernel.graded_matvec(x, weight, thresholds, config=config)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = product.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 6144), (4096, 24576), (12288, 4096)], ids=str)
@pytest.mark.parametrize("rows", [5, 8, 16])
@pytest.mark.parametrize("warpgroups", [False, True])
def test_an_h200_runs_all_ctas_of_a_layer_at_once(shape, rows, warpgroups):
    geometry = best_of(shape, rows, 132, warpgroups)
    assert geometry.blocks <= 132
    assert geometry.shared_bytes <= tuning.SHARED_BYTES_PER_SM
    assert geometry.dense.warpgroups == (warpgroups and rows > 8)


def best_of(shape, rows, multiprocessors, warpgroups=False):
    x = Activations.of(jnp.zeros((rows, shape[0]), jnp.bfloat16))
    weight = NestedWeight.abstract(*shape)
    config = tuning.best_config(
        kernel.geometry_of(x, weight, kernel.ANY_CONFIG),
        device_kind="NVIDIA H200",
        multiprocessors=multiprocessors,
        warpgroups=warpgroups,
    )
    return kernel.geometry_of(x, weight, config)


def test_the_ctas_that_count_levels_take_the_multiprocessors_that_are_left():
    """The gate and up projection of Qwen3-4B leaves two. If all multiply, the counting CTAs wait."""
    launch = best_of((2560, 19456), 16, 132)
    assert (launch.matvec_blocks, launch.counting_blocks) == (130, 2)
    for multiprocessors, counting in ((129, 1), (128, 4), (100, 4)):
        launch = best_of((4096, 4096), 16, multiprocessors)
        assert launch.counting_blocks == counting


@pytest.mark.parametrize("rows", range(1, 17))
@pytest.mark.parametrize("sums", [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)], ids=str)
def test_the_default_fits(rows, sums):
    """It fits every GPU, but for one order of sums, which only measured GPUs with more shared memory have."""
    alone = Config(warpgroups=sums[0], warps_per_group=sums[1], ring_slots=8)
    x = Activations.of(jnp.zeros((rows, 1024), jnp.bfloat16))
    geometry = kernel.geometry_of(x, NestedWeight.abstract(1024, 512), alone)
    for limit in (SHARED_BYTES_LIMIT, tuning.SHARED_BYTES_PER_SM):
        config = tuning.with_dense_rows(geometry, alone, 132, limit)
        fits = kernel.geometry_of(x, NestedWeight.abstract(1024, 512), config).shared_bytes <= limit
        assert fits == (sums != (2, 1) or rows <= 8 or limit > SHARED_BYTES_LIMIT)


@pytest.mark.parametrize(
    ("rows", "warpgroups", "slots", "ctas"),
    [(2, 1, 4, 4), (2, 2, 4, 2), (4, 1, 4, 3), (4, 1, 8, 2), (4, 2, 8, 1)],
)
def test_several_ctas_fit_a_multiprocessor(rows, warpgroups, slots, ctas):
    """A CTA takes 1 KiB more than its shared memory of the 228 KiB of an H200's multiprocessor."""
    config = Config(
        warpgroups=warpgroups, warps_per_group=1, ring_slots=8, byte_pairs=BytePairs(ring_slots=slots)
    )
    x = Activations.of(jnp.zeros((rows, 1024), jnp.bfloat16))
    geometry = kernel.geometry_of(x, NestedWeight.abstract(1024, 512), config)
    assert ctas * (geometry.shared_bytes + 1024) <= 228 * 1024


def test_config_errors_name_the_field_and_the_allowed_values():
    with pytest.raises(ValueError, match=r"DenseRows.step_planes must be one of \(1, 2, 4\), not 3"):
        DenseRows(step_planes=3)
    with pytest.raises(ValueError, match=r"BytePairs.ring_slots must be one of \(2, 4, 8\), not 3"):
        BytePairs(ring_slots=3)
    with pytest.raises(ValueError, match="name different programs"):
        dataclasses.replace(PAIRS, dense_rows=DenseRows())
