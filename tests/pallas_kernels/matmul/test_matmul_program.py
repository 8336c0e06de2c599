"""The lane program of the product at one level on the emulator, and its lowering for absent GPUs."""

import dataclasses

import jax
import jax.numpy as jnp
import matvec_oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from jax.sharding import AxisType
from matvec_cases import Case

from pallas_kernels import NestedWeight, level_matmul
from pallas_kernels.lanes import device
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.matmul.mosaic_gpu import kernel, supports
from pallas_kernels.matmul.mosaic_gpu.geometry import Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import Refs
from pallas_kernels.matmul.mosaic_gpu.multiplication import UNIT
from pallas_kernels.matmul.mosaic_gpu.program import level_matmul_program

TOLERANCE = 1e-4
"""Largest error of a row in norm. Products are exact; sums of 128 channels with their offset are float32."""


def emulate(x, weight: NestedWeight, level: int, multiprocessors: int = 4) -> np.ndarray:
    """Returns y as ``kernel.matmul`` does; fails if the program leaves an output unwritten."""
    g = kernel.geometry_of(len(x), weight, level, multiprocessors)
    operands = [np.array(a) for a in kernel.activation_operands(jnp.asarray(x), g)]
    isa = NumpyInstructions(blocks=g.blocks, threads=g.threads, shared_bytes=g.shared_bytes)
    unwritten = np.float32(12345.678)
    partials = np.full((g.splits, g.rows, g.stored_n), unwritten)
    arrays = [*operands, np.array(weight.planes), np.array(weight.scales), partials]
    level_matmul_program(isa, g, Refs(*(isa.array(a) for a in arrays), shared=None))
    isa.finish()
    assert not (partials == unwritten).any()
    gain = np.asarray(weight.level_gains)[level - 1]
    return partials.astype(np.float64).sum(0)[:, : weight.out_features] * gain / UNIT


def assert_agrees(x, weight, level, y):
    """Checks each row in norm, relative to a product whose terms do not cancel."""
    x, w = x.astype(np.float64), matvec_oracle.dequantize(weight, level)
    scale = np.sqrt((x**2).sum(1) * (w**2).sum() / len(w))
    error = np.linalg.norm(y - x @ w, axis=1)
    assert (error <= TOLERANCE * scale).all(), error / scale


cases = st.builds(
    Case,
    in_features=st.integers(1, 600),
    out_features=st.integers(1, 700),
    rows=st.integers(1, 70),
    max_bits=st.just(8),
    dtype=st.just("bfloat16"),
    activations=st.sampled_from(["gaussian", "outliers", "heavy", "zeros", "all-zero"]),
    seed=st.integers(0, 2**32 - 1),
)


@given(case=cases, level=st.integers(1, 4), multiprocessors=st.sampled_from([1, 3, 132]))
@examples(6, in_ci=60)
def test_agrees_with_float64(case, level, multiprocessors):
    x, weight, _ = case.arrays()
    assert_agrees(x, weight, level, emulate(x, weight, level, multiprocessors))


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [16, 17, 40], ids="rows {}".format)
def test_every_division_of_the_outputs(rows, level):
    """A warp has four, two or one of the digit positions, and a ring of every size."""
    x, weight, _ = Case(300, 640, rows=rows, dtype="bfloat16").arrays()
    assert_agrees(x, weight, level, emulate(x, weight, level))


def test_several_batches_of_rows():
    x, weight, _ = Case(128, 64, rows=130, dtype="bfloat16").arrays()
    assert kernel.geometry_of(130, weight, 3, 4).row_batches == 3
    assert_agrees(x, weight, 3, emulate(x, weight, 3))


@pytest.mark.parametrize("level", [3, 4])
def test_a_large_mean_of_the_activations_does_not_drown_the_product(level):
    x, weight, _ = Case(256, 512, rows=9, dtype="bfloat16").arrays()
    x = (x + 10).astype(x.dtype)
    assert_agrees(x, weight, level, emulate(x, weight, level))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(bad):
    x, weight, _ = Case(300, 600, rows=9, dtype="bfloat16").arrays()
    clean = emulate(x, weight, 3)
    x[1, 200] = bad
    y = emulate(x, weight, 3)
    assert not np.isfinite(y[1]).any()
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


def test_planes_above_the_level_do_not_matter():
    x, weight, _ = Case(300, 600, rows=9, dtype="bfloat16").arrays()
    other = dataclasses.replace(weight, planes=weight.planes[:2])
    np.testing.assert_array_equal(emulate(x, weight, 2), emulate(x, other, 2))


@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 6144), (4096, 24576), (128, 64)], ids=str)
def test_sizes(shape):
    for rows in (1, 9, 16, 32, 64, 65, 256, 512):
        g = Geometry(stored_k=shape[0], stored_n=shape[1], level=4, rows=rows, multiprocessors=132)
        assert g.shared_bytes <= 99 * 1024
        assert g.splits * g.groups_per_cta >= g.groups > (g.splits - 1) * g.groups_per_cta
        assert g.padded_rows >= rows
        assert 8 * g.positions * g.row_tiles <= 64


def test_declines_with_a_reason():
    weight = NestedWeight.abstract(256, 512)
    for rows, dtype, reason in [
        (513, jnp.bfloat16, "takes 1 to 512 rows, not 513"),
        (16, jnp.float32, "takes bfloat16 activations, not float32"),
    ]:
        assert supports(jax.ShapeDtypeStruct((rows, 256), dtype), weight, 3) == reason


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA GeForce RTX 4090"])
@pytest.mark.parametrize(
    ("rows", "shape", "level"),
    [(16, (4096, 6144), 3), (32, (12288, 4096), 4), (64, (4096, 4096), 1), (512, (300, 700), 3)],
    ids=str,
)
def test_lowers_for(kind, rows, shape, level):
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=128, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    weight, x = NestedWeight.abstract(*shape), jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
    run = jax.jit(lambda x, weight: level_matmul(x, weight, level, implementation="mosaic_gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        text = run.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
