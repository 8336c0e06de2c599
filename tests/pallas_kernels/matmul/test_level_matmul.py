"""The product at one level: reference and XLA against the float64 oracle, and the function's contract."""

import dataclasses
import re

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

from grinqh_jax.model.linear import GradedLinear
from pallas_kernels import NestedWeight, graded_matvec, level_matmul
from pallas_kernels.lanes import device
from pallas_kernels.matmul import choose, tuning

TOLERANCE = {"float32": 1e-5, "float16": 1e-5, "bfloat16": 5e-3}
"""Largest error of a row in norm. With bfloat16 x, the weight is rounded to 8 significant bits."""

cases = st.builds(
    Case,
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 600),
    rows=st.sampled_from([1, 9, 33]),
    max_bits=st.sampled_from([2, 4, 6, 8]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    activations=st.sampled_from(["gaussian", "heavy", "zeros", "all-zero"]),
    seed=st.integers(0, 2**32 - 1),
)
implementations = pytest.mark.parametrize("implementation", ["reference", "xla"])


@examples(8, in_ci=100)
@given(case=cases, data=st.data())
def test_equals_dequantization_and_multiplication(case, data):
    x, weight, _ = case.arrays()
    level = data.draw(st.integers(1, weight.num_planes))
    w = matvec_oracle.dequantize(weight, level)
    exact = x.astype(np.float64) @ w
    # Where terms cancel, the error is relative to the norm of a product whose terms do not.
    scale = np.sqrt((x.astype(np.float64) ** 2).sum(1) * (w**2).sum() / len(w))
    for implementation in ("reference", "xla"):
        y = level_matmul(jnp.asarray(x), weight, level, implementation=implementation)
        assert y.dtype == jnp.float32
        assert y.shape == exact.shape
        error = np.linalg.norm(np.asarray(y, np.float64) - exact, axis=1)
        assert (error <= TOLERANCE[case.dtype] * np.maximum(scale, np.linalg.norm(exact, axis=1))).all()


@implementations
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_equals_the_graded_matvec_with_all_channels_at_the_level(implementation, level):
    x, weight, _ = Case(300, 600, rows=3).arrays()
    thresholds = np.where(np.arange(4) < level, 0, np.inf).astype(np.float32)
    weight = jax.tree.map(jnp.asarray, weight)
    graded, bits = graded_matvec(jnp.asarray(x), weight, thresholds)
    y = level_matmul(jnp.asarray(x), weight, level, implementation=implementation)
    np.testing.assert_array_equal(bits, 2 * level)
    np.testing.assert_allclose(y, graded, rtol=1e-4, atol=1e-4 * np.abs(graded).max())


@implementations
def test_planes_above_the_level_do_not_matter(implementation):
    x, weight, _ = Case(300, 600, rows=2, dtype="bfloat16").arrays()
    planes = weight.planes.copy()
    planes[2:] = 0xDEADBEEF
    other = dataclasses.replace(weight, planes=planes)
    run = jax.jit(lambda x, w: level_matmul(x, w, 2, implementation=implementation))
    np.testing.assert_array_equal(run(x, weight), run(x, other))


@implementations
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(implementation, bad):
    x, weight, _ = Case(300, 600, rows=3).arrays()
    clean = level_matmul(jnp.asarray(x), weight, 3, implementation=implementation)
    x[1, 200] = bad
    y = np.asarray(level_matmul(jnp.asarray(x), weight, 3, implementation=implementation))
    assert not np.isfinite(y[1]).any()
    np.testing.assert_array_equal(y[[0, 2]], clean[jnp.asarray([0, 2])])


@pytest.mark.parametrize("leading", [(), (2,), (3, 2)], ids=str)
def test_any_leading_shape(leading):
    _, weight, _ = Case(40, 30).arrays()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((*leading, 40)), jnp.float32)
    y = level_matmul(x, weight, 2)
    assert y.shape == (*leading, 30)
    np.testing.assert_allclose(y, x @ matvec_oracle.dequantize(weight, 2), rtol=1e-3, atol=1e-3)


def test_errors_name_the_value_and_what_is_expected():
    _, weight, _ = Case(40, 30, max_bits=6).arrays()
    x = jnp.zeros((2, 40))
    for level in (0, 4, None):
        with pytest.raises(ValueError, match=rf"level is {level}, expected 1 to 3, the planes of the weight"):
            level_matmul(x, weight, level)
    with pytest.raises(ValueError, match=r"x has shape \(2, 41\), expected \[..., 40\]; x has dtype int32"):
        level_matmul(jnp.zeros((2, 41), jnp.int32), weight, 1)
    with pytest.raises(
        ValueError, match=r"unknown implementation 'cuda': choose from xla, mosaic_gpu, reference"
    ):
        level_matmul(x, weight, 1, implementation="cuda")
    assert choose(x, weight, 1) == "xla"


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
def test_a_gpu_dequantizes_the_planes_of_the_level_with_one_kernel():
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    weight = NestedWeight.abstract(4096, 6144)
    x = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda x, weight: level_matmul(x, weight, 3, implementation="xla")).trace(x, weight)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "tensor<3x4096x384xui32>" not in text  # No copy of the planes that are read.


def on_h200(function, *arguments) -> str:
    """Returns the StableHLO of a function for an H200."""
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
@pytest.mark.parametrize("rows", [16, 128, 129])
def test_the_tuning_table_chooses_the_kernel(monkeypatch, rows):
    """A layer of a prompt, too, runs the kernel for as many rows as the table says."""
    monkeypatch.setattr(tuning, "measured", lambda: {"NVIDIA H200": {"4": 128}})
    weight = NestedWeight.abstract(512, 1024)
    x = jax.ShapeDtypeStruct((1, rows, 512), jnp.bfloat16)

    def dense(x, planes, scales):
        sizes = {"in_features": 512, "out_features": 1024}
        tables = jnp.zeros((3, 4)), jnp.ones(4), jnp.zeros(())
        return GradedLinear(planes, scales, *tables, **sizes).dense(x)

    names = re.findall(r"00(\w+)_kernel_mosaic_gpu", on_h200(dense, x, weight.planes, weight.scales))
    assert names == ["level_matmul_512x1024" if rows <= 128 else "dequantization"]
    at_3 = on_h200(lambda x, weight: level_matmul(x, weight, 3), x, weight)
    assert re.findall(r"00(\w+)_kernel_mosaic_gpu", at_3) == ["dequantization"]  # not in the table


def test_the_table_is_readable_and_names_levels():
    for most_rows in tuning.measured().values():
        assert set(most_rows) <= {"1", "2", "3", "4"}
        assert all(isinstance(rows, int) for rows in most_rows.values())
