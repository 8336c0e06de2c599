"""The program that multiplies pairs of bytes on the emulator: float64, and the bits of each row alone."""

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
from pallas_kernels.matvec.mosaic_gpu import BytePairs, Config, DenseRows, kernel, tuning

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
    byte_pairs=st.builds(BytePairs, ring_slots=st.sampled_from([2, 4, 8])),
)
cases = st.builds(
    Case,
    in_features=st.integers(1, 600),
    out_features=st.integers(1, 600),
    rows=st.integers(1, 8),
    max_bits=st.sampled_from([2, 4, 6, 8]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    activations=st.sampled_from(["gaussian", "outliers", "heavy", "zeros", "all-zero"]),
    config=configs,
    seed=st.integers(0, 2**32 - 1),
)
DEFAULT = Config(warpgroups=1, warps_per_group=2, ring_slots=4, byte_pairs=BytePairs())


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


@given(case=cases, rows=st.integers(1, 8), kind=st.sampled_from(["gaussian", "heavy", "all-zero"]))
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


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_the_defaults_for_1_to_16_rows_give_a_row_the_same_bits(multiprocessors):
    """With one multiprocessor the program without lists is the default from 3 rows on, else from 5 on."""
    case = Case(512, 600, rows=16)
    x, weight, thresholds = case.arrays()
    programs, outputs = set(), []
    for rows in (1, 2, 3, 4, 5, 8, 9, 16):
        one_row = Config(warpgroups=1, warps_per_group=1, ring_slots=4)
        sizes = kernel.geometry_of(Activations.of(jnp.asarray(x[:rows])), weight, one_row)
        config = tuning.best_config(sizes, device_kind="NVIDIA H200", multiprocessors=multiprocessors)
        programs.add(((rows > 2) + (rows > 4), config.byte_pairs is None, config.dense_rows is None))
        outputs.append(emulate(x[:rows], weight, thresholds[:rows], config)[0])
    from_3 = (1, multiprocessors == 1, multiprocessors > 1)
    assert programs == {(0, True, True), (0, False, True), from_3, (2, True, False)}
    for y in outputs:
        np.testing.assert_array_equal(y.view(np.int64), outputs[-1][: len(y)].view(np.int64))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(bad):
    case = Case(300, 600, rows=4, config=DEFAULT)
    x, weight, thresholds = case.arrays()
    clean, _ = emulate(x, weight, thresholds, case.config)
    x[2, 200] = bad
    y, _ = emulate(x, weight, thresholds, case.config)
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.parametrize("count", [3, 33])
def test_applies_the_factor_of_a_norm(count):
    case = Case(300, 600, rows=3, config=DEFAULT)
    x, weight, thresholds = case.arrays()
    squares = np.random.default_rng(count).uniform(0, 1, (3, count)).astype(np.float32)
    y, bits = emulate(x, weight, thresholds, case.config, square_partials=squares, eps=0.25)
    assert not np.array_equal(bits, emulate(x, weight, thresholds, case.config)[1])
    for row in range(3):
        y_alone, bits_alone = alone(case, x, weight, thresholds, row, square_partials=squares, eps=0.25)
        np.testing.assert_array_equal(y[row], y_alone)
        assert bits[row] == bits_alone


@pytest.mark.parametrize("reached", [0, 1, 15, 16, 17, 33, 128])
@pytest.mark.parametrize("slots", [2, 8])
def test_lists_of_any_length(reached, slots):
    """Lists of no entry, of whole steps, and of one entry more or less; K fills whole CTAs."""
    config = dataclasses.replace(DEFAULT, warps_per_group=1, byte_pairs=BytePairs(ring_slots=slots))
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
    x, weight, _ = Case(256, 512, rows=4, config=DEFAULT).arrays()
    thresholds = np.zeros((4, 4), np.float32)
    assert_agrees_with_oracle(x, weight, thresholds, *emulate(x, weight, thresholds, DEFAULT))


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2")
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu[0])
@pytest.mark.parametrize(("rows", "shape", "max_bits"), [(2, (4096, 6144), 8), (7, (300, 700), 6)], ids=str)
def test_lowers_for(gpu, rows, shape, max_bits):
    config = Config(warpgroups=2, warps_per_group=1, ring_slots=8, byte_pairs=BytePairs())
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
    with pytest.raises(ValueError, match=r"BytePairs.ring_slots must be one of \(2, 4, 8\), not 3"):
        BytePairs(ring_slots=3)
    with pytest.raises(ValueError, match="name different programs"):
        dataclasses.replace(DEFAULT, dense_rows=DenseRows())
