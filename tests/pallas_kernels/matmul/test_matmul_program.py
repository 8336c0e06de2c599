"""The lane program of the product at one level on the emulator, and its lowering for absent GPUs."""

import dataclasses
import itertools

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
from pallas_kernels.lanes.emulated_memory import EmulationError
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.matmul.mosaic_gpu import kernel, supports
from pallas_kernels.matmul.mosaic_gpu.geometry import THREADS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import Refs
from pallas_kernels.matmul.mosaic_gpu.program import level_matmul_program

UNWRITTEN = np.uint32(0x7F812345)
"""A NaN that no program computes, in outputs before they are written."""

EXACT, ROUNDED = False, True
either = pytest.mark.parametrize("rounded", [EXACT, ROUNDED], ids=["exact", "rounded"])

TOLERANCES = {EXACT: 2e-5, ROUNDED: 1.2e-2}
"""Largest error of a row in norm.

Only float32 sums round if the program is exact. A weight rounded to bfloat16 has a relative error of at most
2**-8, and about 2.3e-3 in the mean square. A row may be a single number, so five times that is allowed."""

SHARED_LIMITS = (227 * 1024, 163 * 1024)
"""Most shared memory of a CTA on an H200, and a smaller number."""


def geometry(
    rows, weight, level, rounded=EXACT, multiprocessors=4, shared_limit=SHARED_LIMITS[0]
) -> Geometry:
    return Geometry(
        stored_k=weight.planes.shape[1],
        stored_n=weight.scales.shape[1],
        level=level,
        rows=rows,
        multiprocessors=multiprocessors,
        shared_limit=shared_limit,
        rounded=rounded,
    )


def emulate(x, weight: NestedWeight, level: int, rounded: bool = EXACT, **sizes) -> np.ndarray:
    """Returns y as ``kernel.matmul`` does; fails if the program leaves a word of its output unwritten."""
    g = geometry(len(x), weight, level, rounded, **sizes)
    x = np.pad(np.array(x), ((0, 0), (0, g.stored_k - x.shape[1])))
    partials = np.full((g.splits, g.rows, g.stored_n), UNWRITTEN)
    isa = NumpyInstructions(blocks=g.blocks, threads=THREADS, shared_bytes=g.shared_bytes)
    arrays = [x, np.array(weight.planes), np.array(weight.scales), partials]
    level_matmul_program(isa, g, Refs(*(isa.array(a) for a in arrays), None))
    isa.finish()
    assert not (partials == UNWRITTEN).any()
    unit = kernel.unit(level) * np.asarray(weight.level_gains)[level - 1]
    return partials.view(np.float32).astype(np.float64).sum(0)[:, : weight.out_features] * unit


def assert_agrees(x, weight, level, y, rounded=EXACT):
    """Checks each row in norm, relative to a product whose terms do not cancel."""
    x, w = x.astype(np.float64), matvec_oracle.dequantize(weight, level)
    scale = np.sqrt(x**2 @ (w**2).sum(1))
    error = np.linalg.norm(y - x @ w, axis=1)
    assert (error <= TOLERANCES[rounded] * scale).all(), error / scale


cases = st.builds(
    Case,
    in_features=st.integers(1, 600),
    out_features=st.integers(1, 700),
    rows=st.integers(1, 140),
    max_bits=st.just(8),
    dtype=st.just("bfloat16"),
    activations=st.sampled_from(["gaussian", "outliers", "heavy", "zeros", "all-zero"]),
    seed=st.integers(0, 2**32 - 1),
)


@either
@given(
    case=cases,
    level=st.integers(1, 4),
    multiprocessors=st.sampled_from([1, 3, 132]),
    limit=st.sampled_from(SHARED_LIMITS),
)
@examples(4, in_ci=40)
def test_agrees_with_float64(rounded, case, level, multiprocessors, limit):
    x, weight, _ = case.arrays()
    y = emulate(x, weight, level, rounded, multiprocessors=multiprocessors, shared_limit=limit)
    assert_agrees(x, weight, level, y, rounded)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "rounded"), [(8, EXACT), (16, EXACT), (33, EXACT), (64, EXACT), (33, ROUNDED), (128, ROUNDED)]
)
def test_every_level(rows, rounded, level):
    """640 outputs: the last tile has half of the pieces."""
    x, weight, _ = Case(300, 640, rows=rows, dtype="bfloat16").arrays()
    assert_agrees(x, weight, level, emulate(x, weight, level, rounded), rounded)


@pytest.mark.parametrize(("rounded", "batches"), [(EXACT, 3), (ROUNDED, 2)])
def test_several_batches_of_rows(rounded, batches):
    x, weight, _ = Case(512, 300, rows=130, dtype="bfloat16").arrays()
    assert geometry(130, weight, 3, rounded).row_batches == batches
    assert_agrees(x, weight, 3, emulate(x, weight, 3, rounded), rounded)


def test_weights_are_rounded_once():
    """Products with unit vectors are the weights in units of the last digit, rounded to bfloat16."""
    _, weight, _ = Case(128, 64, rows=1, dtype="bfloat16").arrays()
    weight = dataclasses.replace(weight, level_gains=np.ones(4, np.float32))
    x = np.eye(64, 128).astype(jnp.bfloat16)
    y = emulate(x, weight, 4, ROUNDED)
    exact = matvec_oracle.dequantize(weight, 4)[:64] / kernel.unit(4)
    rounded = exact.astype(jnp.bfloat16).astype(np.float64) * kernel.unit(4)
    differs = y != rounded
    assert differs.mean() < 0.01  # Halfway cases may differ, because the last bits of a scale come last.
    assert (np.abs(y - rounded) <= 2**-7 * np.abs(rounded)).all()


@pytest.mark.parametrize(
    ("multiprocessors", "teams", "splits"),
    [(1, 1, 1), (4, 2, 2), (6, 3, 1), (10, 5, 3), (24, 8, 3), (30, 15, 5)],
)
def test_every_division_of_the_units(multiprocessors, teams, splits):
    """A team has several tiles or a part of one; a tile has a different number of teams than another."""
    x, weight, _ = Case(600, 1300, rows=9, dtype="bfloat16").arrays()
    g = geometry(9, weight, 3, multiprocessors=multiprocessors)
    assert (g.teams, g.splits) == (teams, splits)
    assert_agrees(x, weight, 3, emulate(x, weight, 3, multiprocessors=multiprocessors))


def test_every_digit_counts():
    """Weights with a single digit that is not 0 differ from each other as the format says."""
    x, weight, _ = Case(128, 64, rows=1, dtype="bfloat16").arrays()
    for plane in range(4):
        planes = np.zeros_like(weight.planes)
        planes[plane] = weight.planes[plane]
        one = dataclasses.replace(weight, planes=planes)
        assert_agrees(x, one, 4, emulate(x, one, 4))


@pytest.mark.parametrize("level", [3, 4])
def test_heavy_tails(level):
    """Cauchy variables, clipped at 1000 times their median magnitude."""
    _, weight, _ = Case(512, 512, rows=1, dtype="bfloat16").arrays()
    x = np.clip(np.random.default_rng(0).standard_cauchy((24, 512)), -1000, 1000)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16))
    assert_agrees(x, weight, level, emulate(x, weight, level))


@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_tiny_and_huge_activations(magnitude):
    x, weight, _ = Case(256, 64, rows=3, dtype="bfloat16").arrays()
    x = np.asarray(jnp.asarray(x, jnp.bfloat16) * magnitude)
    assert_agrees(x, weight, 3, emulate(x, weight, 3))


@pytest.mark.parametrize("level", [3, 4])
def test_a_large_mean_of_the_activations_does_not_drown_the_product(level):
    x, weight, _ = Case(256, 512, rows=9, dtype="bfloat16").arrays()
    x = (x + 10).astype(x.dtype)
    assert_agrees(x, weight, level, emulate(x, weight, level))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@either
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(rounded, bad):
    x, weight, _ = Case(300, 600, rows=9, dtype="bfloat16").arrays()
    clean = emulate(x, weight, 3, rounded)
    x[1, 200] = bad
    y = emulate(x, weight, 3, rounded)
    assert not np.isfinite(y[1]).any()
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize(
    ("few", "many", "rounded"), [(1, 32, EXACT), (33, 64, EXACT), (1, 64, ROUNDED), (65, 128, ROUNDED)]
)
def test_the_number_of_other_rows_does_not_change_a_row(few, many, rounded):
    """The order of the sums depends on the batches only."""
    x, weight, _ = Case(600, 700, rows=many, dtype="bfloat16").arrays()
    first = emulate(x[:few], weight, 3, rounded, multiprocessors=7)
    np.testing.assert_array_equal(first, emulate(x, weight, 3, rounded, multiprocessors=7)[:few])


def test_planes_above_the_level_do_not_matter():
    x, weight, _ = Case(300, 600, rows=9, dtype="bfloat16").arrays()
    other = dataclasses.replace(weight, planes=weight.planes[:2])
    np.testing.assert_array_equal(emulate(x, weight, 2), emulate(x, other, 2))


@pytest.mark.parametrize("limit", SHARED_LIMITS)
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 6144), (4096, 24576), (128, 64)], ids=str)
def test_sizes(shape, limit):
    for rows, level, rounded in itertools.product((1, 9, 32, 64, 65, 256, 512), (1, 4), (EXACT, ROUNDED)):
        weight = NestedWeight.abstract(*shape)
        g = geometry(rows, weight, level, rounded, multiprocessors=132, shared_limit=limit)
        assert g.shared_bytes <= limit - 2048
        assert g.units <= g.teams * g.units_per_cta < g.units + g.units_per_cta
        assert g.blocks <= max(132, 2 * g.row_batches)
        assert g.row_batches * g.rows_per_cta >= rows
        assert g.octets <= (16 if rounded else 8)
        assert g.slots >= 2


def test_declines_with_a_reason():
    weight = NestedWeight.abstract(256, 512)
    for rows, dtype, reason in [
        (513, jnp.bfloat16, "takes 1 to 512 rows, not 513"),
        (16, jnp.float32, "takes bfloat16 activations, not float32"),
    ]:
        assert supports(jax.ShapeDtypeStruct((rows, 256), dtype), weight, 3) == reason


@pytest.mark.parametrize(
    ("instruction", "without", "message"),
    [
        ("wait_arrival", lambda isa, barrier, parity: None, "nothing has written, or that a copy"),
        ("block_barrier", lambda isa: None, "race"),
    ],
)
def test_the_emulator_refuses_the_program_without(monkeypatch, instruction, without, message):
    monkeypatch.setattr(NumpyInstructions, instruction, without)
    x, weight, _ = Case(1024, 64, rows=9, dtype="bfloat16").arrays()
    with pytest.raises(EmulationError, match=message):
        emulate(x, weight, 3, multiprocessors=1)


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
@pytest.mark.parametrize(
    ("rows", "shape", "level"),
    [(16, (4096, 6144), 3), (32, (12288, 4096), 4), (64, (4096, 4096), 1), (512, (300, 700), 3)],
    ids=str,
)
def test_lowers_for_an_h200(rows, shape, level):
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    weight, x = NestedWeight.abstract(*shape), jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
    run = jax.jit(lambda x, weight: level_matmul(x, weight, level, implementation="mosaic_gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        text = run.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
