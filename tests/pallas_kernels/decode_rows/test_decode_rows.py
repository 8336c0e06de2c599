"""Residual and norm, and SwiGLU, of a decode step: the lane programs on the emulator against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_rows.program import (
    AddNormRefs,
    Shape,
    SwigluRefs,
    add_norm_program,
    swiglu_program,
)
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.lanes.rows import MOST_PARTS, Rows

SIZES = [(1, 256, 5), (3, 300, 1), (1, 12288, 2), (2, 64, 16)]  # rows, columns, parts
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def rounded(x) -> np.ndarray:
    """float64 of the nearest bfloat16."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)


def partial_sums(rng, size, columns: int) -> np.ndarray:
    """f32 ``[parts, rows, stored columns]``, NaN in the padding."""
    rows, _, parts = size
    sums = np.full((parts, rows, -(-columns // 512) * 512), np.nan, np.float32)
    sums[:, :, :columns] = rng.standard_normal((parts, rows, columns))
    return sums


def run(program, refs, shape: Shape, inputs, num_sums: int, num_values: int):
    """The outputs: bfloat16 rows as float64, then sums in parts."""
    rows = shape.rows
    isa = NumpyInstructions(blocks=rows.blocks, threads=rows.threads, shared_bytes=rows.shared_bytes)
    values = [np.full((rows.rows, rows.columns), np.nan, jnp.bfloat16) for _ in range(num_values)]
    sums = [np.full((rows.rows, rows.parts), np.nan, np.float32) for _ in range(num_sums)]
    program(isa, shape, refs(*(isa.array(a) for a in (*inputs, *values, *sums)), shared=None))
    isa.finish()
    return [v.astype(np.float64) for v in values] + sums


@sizes
def test_add_norm(size):
    rng = np.random.default_rng(0)
    rows = Rows(*size[:2])
    x = np.array(jnp.asarray(rng.standard_normal(size[:2]), jnp.bfloat16))
    gain = np.array(jnp.asarray(rng.uniform(0.5, 1.5, size[1]), jnp.bfloat16))
    sums = partial_sums(rng, size, rows.columns)
    shape = Shape(rows, size[2], sums.shape[2])
    total, values, squares = run(add_norm_program, AddNormRefs, shape, (x, sums, gain), 1, 2)
    expected = x.astype(np.float64) + sums[:, :, : rows.columns].sum(0)
    np.testing.assert_allclose(total, expected, rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(values, rounded(total * gain.astype(np.float64)))
    np.testing.assert_allclose(squares.sum(1), (total**2).mean(1), rtol=1e-5)


@sizes
def test_swiglu(size):
    rng = np.random.default_rng(1)
    rows = Rows(*size[:2])
    sums = partial_sums(rng, size, 2 * rows.columns)
    sums[0, 0, :4] = 40, -40, 400, -400
    shape = Shape(rows, size[2], sums.shape[2])
    (values,) = run(swiglu_program, SwigluRefs, shape, (sums,), 0, 1)
    gate, up = np.split(sums.astype(np.float64).sum(0)[:, : 2 * rows.columns], 2, axis=1)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(values, expected, rtol=2**-8, atol=1e-6)


def test_nan_reaches_every_sum():
    rows = Rows(1, 512)
    x = np.ones((1, 512), jnp.bfloat16)
    sums = np.ones((1, 1, 512), np.float32)
    sums[0, 0, 300] = np.nan
    outputs = run(add_norm_program, AddNormRefs, Shape(rows, 1, 512), (x, sums, x[0]), 1, 2)
    for output in outputs:
        assert np.isnan(output).any()


@pytest.mark.parametrize("columns", [64, 1024, 2048, 4096, 5120, 8192, 12288, 14336, 17408, 28672])
def test_rows_are_cut_into_few_parts(columns):
    rows = Rows(1, columns)
    assert rows.parts <= MOST_PARTS
    assert (rows.parts - 1) * 2 * rows.threads < columns <= rows.parts * 2 * rows.threads
