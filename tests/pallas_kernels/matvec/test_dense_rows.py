"""The program without lists on the emulator: float64, and the bits of each row alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import alone, emulate
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from jax.sharding import AxisType
from matvec_cases import Case, assert_agrees_with_oracle, draw_thresholds, draw_x

from pallas_kernels import Activations, NestedWeight
from pallas_kernels.lanes import device
from pallas_kernels.matvec.mosaic_gpu import Config, DenseRows, kernel, tuning
from pallas_kernels.matvec.mosaic_gpu.geometry import SHARED_BYTES_LIMIT

DENSE_ROWS = st.builds(
    DenseRows,
    teams=st.sampled_from([1, 2]),
    step_planes=st.sampled_from([1, 2, 4]),
    ring_slots=st.sampled_from([2, 4, 8]),
    tiles=st.integers(1, 4),
) | st.builds(
    DenseRows,
    teams=st.sampled_from([1, 2]),
    step_planes=st.sampled_from([1, 2, 4]),
    warpgroups=st.just(True),
)
GPUS = [
    ("NVIDIA H200", 132),
    ("NVIDIA GeForce RTX 4090", 128),
    ("NVIDIA B200", 148),
    ("NVIDIA GeForce RTX 5090", 170),
]


configs = st.builds(
    Config,
    warpgroups=st.sampled_from([1, 2]),
    warps_per_group=st.sampled_from([1, 2, 4]),
    ring_slots=st.just(4),
    dense_rows=DENSE_ROWS,
)
cases = st.builds(
    Case,
    in_features=st.integers(1, 600),
    out_features=st.integers(1, 600),
    rows=st.integers(1, 16),
    max_bits=st.sampled_from([2, 4, 6, 8]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    activations=st.sampled_from(["gaussian", "outliers", "heavy", "zeros", "all-zero"]),
    config=configs,
    seed=st.integers(0, 2**32 - 1),
)
DEFAULT = Config(warpgroups=1, warps_per_group=2, ring_slots=4, dense_rows=DenseRows())


@given(case=cases, data=st.data())
@examples(8, in_ci=125)
def test_agrees_with_float64_and_with_the_row_alone(case, data):
    x, weight, thresholds = case.arrays()
    y, bits = emulate(x, weight, thresholds, case.config)
    assert_agrees_with_oracle(x, weight, thresholds, y, bits)
    row = data.draw(st.integers(0, case.rows - 1))
    y_alone, bits_alone = alone(case, x, weight, thresholds, row)
    np.testing.assert_array_equal(y[row].view(np.int64), y_alone.view(np.int64))
    assert bits[row] == bits_alone


@given(case=cases, whole_tiles=st.integers(0, 1), pieces=st.integers(1, 7), data=st.data())
@examples(4, in_ci=60)
def test_a_last_tile_of_any_number_of_pieces(case, whole_tiles, pieces, data):
    sizes = {"in_features": case.in_features % 300 + 1, "out_features": 512 * whole_tiles + 64 * pieces}
    case = dataclasses.replace(case, **sizes)
    x, weight, thresholds = case.arrays()
    y, bits = emulate(x, weight, thresholds, case.config)
    assert_agrees_with_oracle(x, weight, thresholds, y, bits)
    row = data.draw(st.integers(0, case.rows - 1))
    y_alone, _ = alone(case, x, weight, thresholds, row)
    np.testing.assert_array_equal(y[row].view(np.int64), y_alone.view(np.int64))


@given(case=cases, rows=st.integers(1, 16), kind=st.sampled_from(["gaussian", "heavy", "all-zero"]))
@examples(4, in_ci=60)
def test_a_row_has_the_same_bits_in_any_company(case, rows, kind):
    """The row moves to another place among other rows, in a batch of another size."""
    x, weight, thresholds = case.arrays()
    rng = np.random.default_rng(case.seed)
    others = draw_x(rng, (rows, case.in_features), kind).astype(x.dtype)
    limits = draw_thresholds(rng, np.abs(others.astype(np.float32)), weight.num_planes)
    old, new = rng.integers(case.rows), rng.integers(rows)
    others[new], limits[new] = x[old], thresholds[old]
    y, bits = emulate(x, weight, thresholds, case.config)
    in_company, bits_in_company = emulate(others, weight, limits, case.config)
    np.testing.assert_array_equal(y[old].view(np.int64), in_company[new].view(np.int64))
    assert bits[old] == bits_in_company[new]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(bad):
    case = Case(300, 600, rows=6, config=DEFAULT)
    x, weight, thresholds = case.arrays()
    clean, _ = emulate(x, weight, thresholds, case.config)
    x[4, 200] = bad
    y, _ = emulate(x, weight, thresholds, case.config)
    assert not np.isfinite(y[4]).any()
    np.testing.assert_array_equal(np.delete(y, 4, 0), np.delete(clean, 4, 0))


@pytest.mark.parametrize("count", [3, 16, 33])
def test_applies_the_factor_of_a_norm(count):
    case = Case(300, 600, rows=10, config=DEFAULT)
    x, weight, thresholds = case.arrays()
    squares = np.random.default_rng(count).uniform(0, 1, (10, count)).astype(np.float32)
    y, bits = emulate(x, weight, thresholds, case.config, square_partials=squares, eps=0.25)
    assert not np.array_equal(bits, emulate(x, weight, thresholds, case.config)[1])
    for row in (0, 7, 9):
        y_alone, bits_alone = alone(case, x, weight, thresholds, row, square_partials=squares, eps=0.25)
        np.testing.assert_array_equal(y[row], y_alone)
        assert bits[row] == bits_alone


@pytest.mark.parametrize("teams", [1, 2])
@pytest.mark.parametrize("reached", [0, 1, 31, 32, 33, 128])
def test_any_number_of_channels_that_some_row_reads(reached, teams):
    """The other plane rows are not copied: the ring holds noise there, or rows of earlier steps."""
    dense_rows = DenseRows(teams=teams, ring_slots=2, step_planes=1)
    config = Config(warpgroups=1, warps_per_group=1, ring_slots=4, dense_rows=dense_rows)
    x, weight, _ = Case(512, 512, rows=2, config=config).arrays()
    x[:] = 0.5
    for group in np.split(x[1], 4):
        group[np.random.default_rng(reached).permutation(128)[:reached]] = 2
    thresholds = np.full((2, 4), np.inf, np.float32)
    thresholds[:, 0] = 1
    y, bits = emulate(x, weight, thresholds, config)
    np.testing.assert_allclose(bits, [0, 2 * reached / 128])
    assert_agrees_with_oracle(x, weight, thresholds, y, bits)


def test_every_channel_at_the_highest_level():
    x, weight, _ = Case(256, 512, rows=16, config=DEFAULT).arrays()
    thresholds = np.zeros((16, 4), np.float32)
    assert_agrees_with_oracle(x, weight, thresholds, *emulate(x, weight, thresholds, DEFAULT))


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2")
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu[0])
@pytest.mark.parametrize(
    ("rows", "shape", "max_bits"), [(2, (4096, 6144), 8), (16, (300, 700), 6), (8, (576, 320), 8)], ids=str
)
@pytest.mark.parametrize("dense_rows", [DenseRows(), DenseRows(teams=2, ring_slots=4, tiles=2)], ids=str)
def test_lowers_for(gpu, rows, shape, max_bits, dense_rows):
    config = Config(warpgroups=1, warps_per_group=1, ring_slots=8, dense_rows=dense_rows)
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
@pytest.mark.parametrize("teams", [1, 2])
def test_an_h200_runs_all_ctas_of_a_layer_at_once(shape, rows, teams):
    x = Activations.of(jnp.zeros((rows, shape[0]), jnp.bfloat16))
    alone = tuning._measured()["NVIDIA H200"][shape]
    geometry = kernel.geometry_of(x, NestedWeight.abstract(*shape), alone)
    dense_rows = DenseRows(teams=teams, step_planes=1)
    limit = tuning.SHARED_BYTES_PER_SM
    config = tuning.with_dense_rows(geometry, alone, 132, limit, dense_rows)
    geometry = kernel.geometry_of(x, NestedWeight.abstract(*shape), config)
    assert geometry.blocks <= 132
    assert geometry.shared_bytes <= limit


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


def test_config_errors_name_the_field_and_the_allowed_values():
    with pytest.raises(ValueError, match=r"DenseRows.teams must be one of \(1, 2\), not 3"):
        DenseRows(teams=3)
