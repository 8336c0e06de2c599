"""The lane programs of residual and norm, and of SwiGLU, on the emulator against float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_rows.program import (
    AddNormRefs,
    Clamp,
    Shape,
    SwigluRefs,
    add_norm_program,
    swiglu_program,
)
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.lanes.rows import MAX_BLOCKS_PER_ROW, Rows
from pallas_kernels.router.grading_factor import grading_factor

SIZES = [(1, 256, 5), (3, 300, 1), (1, 12288, 2), (2, 64, 16)]  # rows, features, partial sums
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def rounded(x) -> np.ndarray:
    """Rounds to the nearest bfloat16; returns float64."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)


def random_partials(rng, size, features: int) -> np.ndarray:
    """Returns float32 ``[partials, rows, stored features]``, NaN in the padding."""
    rows, _, count = size
    partials = np.full((count, rows, -(-features // 512) * 512), np.nan, np.float32)
    partials[:, :, :features] = rng.standard_normal((count, rows, features))
    return partials


def run(program, refs, shape: Shape, inputs, num_sums: int, num_values: int):
    """Returns the outputs: bfloat16 rows as float64, then partial sums of the rows."""
    rows = shape.rows
    isa = NumpyInstructions(blocks=rows.blocks, threads=rows.threads, shared_bytes=rows.shared_bytes)
    values = [np.full((rows.rows, rows.features), np.nan, jnp.bfloat16) for _ in range(num_values)]
    sums = [np.full((rows.rows, rows.blocks_per_row), np.nan, np.float32) for _ in range(num_sums)]
    program(isa, shape, refs(*(isa.array(a) for a in (*inputs, *values, *sums)), shared=None))
    isa.finish()
    return [v.astype(np.float64) for v in values] + sums


@sizes
def test_add_norm(size):
    rng = np.random.default_rng(0)
    rows = Rows(*size[:2])
    x = np.array(jnp.asarray(rng.standard_normal(size[:2]), jnp.bfloat16))
    norm_scale = np.array(jnp.asarray(rng.uniform(0.5, 1.5, size[1]), jnp.bfloat16))
    partials = random_partials(rng, size, rows.features)
    shape = Shape(rows, size[2], partials.shape[2])
    total, values, squares = run(add_norm_program, AddNormRefs, shape, (x, partials, norm_scale), 1, 2)
    expected = x.astype(np.float64) + partials[:, :, : rows.features].sum(0)
    np.testing.assert_allclose(total, expected, rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(values, rounded(total * norm_scale.astype(np.float64)))
    np.testing.assert_allclose(squares.sum(1), (total**2).mean(1), rtol=1e-5)


def test_add_norm_adds_up_the_terms_of_a_mixture():
    rng = np.random.default_rng(2)
    rows, terms = Rows(3, 300), 4
    x = np.array(jnp.asarray(rng.standard_normal((3, 300)), jnp.bfloat16))
    partials = random_partials(rng, (3 * terms, 300, 2), 300)
    shape = Shape(rows, 2, partials.shape[2], terms)
    total, _, _ = run(add_norm_program, AddNormRefs, shape, (x, partials, x[0]), 1, 2)
    update = partials[:, :, :300].astype(np.float64).reshape(2, 3, terms, 300).sum(axis=(0, 2))
    np.testing.assert_allclose(total, x.astype(np.float64) + update, rtol=2**-8, atol=1e-6)


@sizes
@pytest.mark.parametrize("clamp", [None, Clamp(1.702, 0.75)], ids=["silu", "clamped"])
def test_swiglu_of_experts(size, clamp):
    rng = np.random.default_rng(3)
    rows = Rows(*size[:2])
    probabilities = rng.uniform(0, 1, rows.rows).astype(np.float32) ** 8
    partials = random_partials(rng, size, 2 * rows.features)
    factor = np.asarray(grading_factor(jnp.asarray(probabilities)))[:, None]
    shape = Shape(rows, size[2], partials.shape[2])

    def refs(probabilities, partials, values, shared):
        return SwigluRefs(partials, values, shared, probabilities)

    program = functools.partial(swiglu_program, clamp=clamp)
    (values,) = run(program, refs, shape, (probabilities, partials), 0, 1)
    exact = partials.astype(np.float64).sum(0)[:, : 2 * rows.features] / factor
    gate, up = np.split(exact, 2, axis=1)
    alpha = 1.0
    if clamp is not None:
        alpha = clamp.alpha
        gate, up = np.minimum(gate, clamp.limit), np.clip(up, -clamp.limit, clamp.limit) + 1
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-alpha * gate)) * up * probabilities[:, None]
    np.testing.assert_allclose(values, expected, rtol=2**-8, atol=1e-6)


@sizes
def test_swiglu(size):
    rng = np.random.default_rng(1)
    rows = Rows(*size[:2])
    partials = random_partials(rng, size, 2 * rows.features)
    partials[0, 0, :4] = 40, -40, 400, -400
    shape = Shape(rows, size[2], partials.shape[2])
    (values,) = run(swiglu_program, SwigluRefs, shape, (partials,), 0, 1)
    gate, up = np.split(partials.astype(np.float64).sum(0)[:, : 2 * rows.features], 2, axis=1)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(values, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("place", [3, 67], ids=["gate", "up"])
def test_a_clamp_keeps_nan(place):
    partials = np.ones((1, 1, 128), np.float32)
    partials[0, 0, place] = np.nan
    program = functools.partial(swiglu_program, clamp=Clamp(1.702, 7.0))
    (values,) = run(program, SwigluRefs, Shape(Rows(1, 64), 1, 128), (partials,), 0, 1)
    np.testing.assert_array_equal(np.isnan(values[0]), np.arange(64) == 3)


def test_nan_reaches_every_output():
    rows = Rows(1, 512)
    x = np.ones((1, 512), jnp.bfloat16)
    partials = np.ones((1, 1, 512), np.float32)
    partials[0, 0, 300] = np.nan
    outputs = run(add_norm_program, AddNormRefs, Shape(rows, 1, 512), (x, partials, x[0]), 1, 2)
    for output in outputs:
        assert np.isnan(output).any()


@pytest.mark.parametrize("features", [64, 1024, 2048, 4096, 5120, 8192, 12288, 14336, 17408, 28672])
def test_few_blocks_cover_a_row(features):
    rows = Rows(1, features)
    assert rows.blocks_per_row <= MAX_BLOCKS_PER_ROW
    assert (rows.blocks_per_row - 1) * 2 * rows.threads < features <= rows.blocks_per_row * 2 * rows.threads
