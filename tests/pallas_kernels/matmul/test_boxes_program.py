"""The product at one level with copies of boxes on the emulator, and its lowering for absent GPUs."""

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
from test_matmul_program import SHARED_LIMITS, TOLERANCE, UNWRITTEN, cases

from pallas_kernels import NestedWeight
from pallas_kernels.lanes import device
from pallas_kernels.lanes.emulated_memory import EmulationError
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.matmul.mosaic_gpu import kernel
from pallas_kernels.matmul.mosaic_gpu.boxes import Boxes, BoxesGeometry, BoxesRefs, boxes_program
from pallas_kernels.matmul.mosaic_gpu.geometry import THREADS

ROUNDED_TOLERANCE = 1.2e-2
"""Largest error of a row in norm with weights that are rounded to bfloat16.

A weight's relative error is at most 2**-8, and about 2.3e-3 in the mean square. A row may be a single number,
so five times that is allowed."""

EXACT, ROUNDED = Boxes(), Boxes(rounded=True, exchange_units=1)
WIDE = Boxes(rounded=True, rows=128, exchange_units=1)
every_variant = pytest.mark.parametrize("boxes", [EXACT, ROUNDED, WIDE], ids=str)


def geometry(rows, weight, level, boxes, multiprocessors=4, shared_limit=SHARED_LIMITS[0]) -> BoxesGeometry:
    return BoxesGeometry(
        stored_k=weight.planes.shape[1],
        stored_n=weight.scales.shape[1],
        level=level,
        rows=rows,
        multiprocessors=multiprocessors,
        shared_limit=shared_limit,
        boxes=boxes,
    )


def emulate(x, weight: NestedWeight, level: int, boxes: Boxes, **sizes) -> np.ndarray:
    """Returns y as ``kernel.matmul`` does; fails if the program leaves a word of its output unwritten."""
    g = geometry(len(x), weight, level, boxes, **sizes)
    x = np.pad(np.array(x), ((0, 0), (0, g.stored_k - x.shape[1])))
    y = np.full((g.rows, g.stored_n), UNWRITTEN)
    isa = NumpyInstructions(blocks=g.blocks, threads=THREADS, shared_bytes=g.shared_bytes, cluster=g.cluster)
    arrays = [x, *map(np.array, (weight.planes, weight.scales, weight.level_gains)), y]
    boxes_program(isa, g, BoxesRefs(*(isa.array(a) for a in arrays), None), kernel.unit(level))
    isa.finish()
    assert not (y == UNWRITTEN).any()
    return y.view(np.float32)[:, : weight.out_features]


def assert_agrees(x, weight, level, y, boxes):
    """Checks each row in norm, relative to a product whose terms do not cancel."""
    x, w = x.astype(np.float64), matvec_oracle.dequantize(weight, level)
    scale = np.sqrt(x**2 @ (w**2).sum(1))
    error = np.linalg.norm(y - x @ w, axis=1)
    assert (error <= (ROUNDED_TOLERANCE if boxes.rounded else TOLERANCE) * scale).all(), error / scale


@every_variant
@given(
    case=cases,
    level=st.integers(1, 4),
    multiprocessors=st.sampled_from([1, 3, 16, 132]),
    limit=st.sampled_from(SHARED_LIMITS),
)
@examples(4, in_ci=40)
def test_agrees_with_float64(boxes, case, level, multiprocessors, limit):
    x, weight, _ = case.arrays()
    y = emulate(x, weight, level, boxes, multiprocessors=multiprocessors, shared_limit=limit)
    assert_agrees(x, weight, level, y, boxes)


@every_variant
@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [8, 33, 64], ids="rows {}".format)
def test_every_level(boxes, rows, level):
    """640 outputs: the last tile has half of the pieces. Three groups for two CTAs."""
    x, weight, _ = Case(300, 640, rows=rows, dtype="bfloat16").arrays()
    y = emulate(x, weight, level, boxes, multiprocessors=8)
    assert_agrees(x, weight, level, y, boxes)


@pytest.mark.parametrize("rows", [65, 128, 130])
def test_more_rows(rows):
    x, weight, _ = Case(512, 300, rows=rows, dtype="bfloat16").arrays()
    assert_agrees(x, weight, 3, emulate(x, weight, 3, WIDE, multiprocessors=16), WIDE)
    assert_agrees(x, weight, 3, emulate(x, weight, 3, EXACT, multiprocessors=16), EXACT)


@pytest.mark.parametrize(
    ("multiprocessors", "cluster", "tiles"),
    [(1, 1, 6), (3, 1, 2), (8, 1, 1), (12, 2, 1), (16, 5, 2), (32, 5, 1)],
)
def test_every_division_of_the_work(multiprocessors, cluster, tiles):
    """CTAs alone, clusters of equal and of unequal parts, with one tile and with several."""
    x, weight, _ = Case(600, 1300, rows=9, dtype="bfloat16").arrays()
    boxes = Boxes(exchange_units=0.75)
    g = geometry(9, weight, 3, boxes, multiprocessors)
    assert (g.cluster, g.tiles_per_cluster) == (cluster, tiles)
    assert_agrees(x, weight, 3, emulate(x, weight, 3, boxes, multiprocessors=multiprocessors), boxes)


@pytest.mark.parametrize("shape", [(4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096), (14336, 4096)])
@every_variant
def test_the_sizes_fit_an_h200(shape, boxes):
    weight = NestedWeight.abstract(*shape)
    for rows in (1, 16, 32, 64, 128, 256, 512):
        for level in (1, 2, 3, 4):
            g = geometry(rows, weight, level, boxes, multiprocessors=132)
            assert g.shared_bytes <= SHARED_LIMITS[0] - 2048
            assert g.slots >= 3
            assert g.blocks <= 132 or g.row_batches > 4
            assert g.cluster * g.clusters * g.tiles_per_cluster >= g.tiles


def test_weights_are_rounded_once():
    """Products with unit vectors are the weights in units of the last digit, rounded to bfloat16."""
    _, weight, _ = Case(128, 64, rows=1, dtype="bfloat16").arrays()
    weight = dataclasses.replace(weight, level_gains=np.ones(4, np.float32))
    x = np.eye(64, 128).astype(jnp.bfloat16)
    y = emulate(x, weight, 4, ROUNDED)
    exact = matvec_oracle.dequantize(weight, 4)[:64] / kernel.unit(4)
    rounded = exact.astype(jnp.bfloat16).astype(np.float64) * kernel.unit(4)
    differs = y != rounded.astype(np.float32)
    assert differs.mean() < 0.01  # Halfway cases may differ, because the last bits of a scale come last.
    assert (np.abs(y - rounded) <= 2**-7 * np.abs(rounded)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_variant
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(boxes, bad):
    x, weight, _ = Case(300, 600, rows=9, dtype="bfloat16").arrays()
    clean = emulate(x, weight, 3, boxes)
    x[1, 200] = bad
    y = emulate(x, weight, 3, boxes)
    assert not np.isfinite(y[1]).any()
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


@every_variant
def test_a_row_has_the_same_bits_alone_and_among_others(boxes):
    x, weight, _ = Case(600, 512, rows=64, dtype="bfloat16").arrays()
    alone = emulate(x[:1], weight, 3, boxes, multiprocessors=16)
    np.testing.assert_array_equal(emulate(x, weight, 3, boxes, multiprocessors=16)[:1], alone)


@pytest.mark.parametrize(
    ("instruction", "without", "message"),
    [
        ("wait_arrival", lambda isa, barrier, parity: None, "nothing has written, or that a copy"),
        ("block_barrier", lambda isa: None, "race"),
        ("cluster_barrier", lambda isa: None, "race|nothing has written|no cluster_barrier"),
    ],
)
def test_the_emulator_refuses_the_program_without(monkeypatch, instruction, without, message):
    monkeypatch.setattr(NumpyInstructions, instruction, without)
    x, weight, _ = Case(1024, 64, rows=9, dtype="bfloat16").arrays()
    with pytest.raises(EmulationError, match=message):
        emulate(x, weight, 3, EXACT)


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
@pytest.mark.parametrize(
    ("rows", "shape", "level", "boxes"),
    [
        (16, (4096, 6144), 3, EXACT),
        (64, (4096, 24576), 4, EXACT),
        (64, (12288, 4096), 1, ROUNDED),
        (256, (4096, 4096), 3, WIDE),
    ],
    ids=str,
)
def test_lowers_for_an_h200(rows, shape, level, boxes):
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    weight, x = NestedWeight.abstract(*shape), jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
    run = jax.jit(lambda x, weight: kernel.matmul(x, weight, level, boxes))
    with jax.sharding.use_abstract_mesh(mesh):
        text = run.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
