"""The graded matvec on a CPU: reference and XLA against the float64 oracle, and the public function's
contract."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import matvec_oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from pallas_kernels import codes, graded_matvec, grading
from pallas_kernels.matvec import IMPLEMENTATIONS, api, choose, xla

TOLERANCE = 1e-5
"""Largest error of a row, relative to its largest output."""

THRESHOLDS = np.array([0.1, 0.6, 1.1, 2.2], np.float32)
"""Thresholds that read about 3 bits of Gaussian activations."""

MANY = xla.ROWS_BY_CHANNEL + 1
"""Smallest number of rows for which XLA computes one dense product."""

implementations = pytest.mark.parametrize("implementation", ["reference", "xla"])
all_rows = pytest.mark.parametrize("rows", [1, 3, MANY])


def make_weight(k, n, max_bits=8):
    w = np.random.default_rng(k * n).standard_normal((k, n)).astype(np.float32)
    return codes.quantize(jnp.asarray(w), max_bits=max_bits)


WEIGHTS = {
    (k, n, bits): make_weight(k, n, bits) for k, n, bits in [(40, 30, 8), (300, 600, 8), (256, 512, 4)]
}
WEIGHT = WEIGHTS[300, 600, 8]
WEIGHTS["level gains"] = dataclasses.replace(WEIGHT, level_gains=jnp.asarray([0.86, 0.97, 1.1, 1.0]))


def activations(rows, k=300, seed=0, shape="gaussian"):
    rng = np.random.default_rng(seed)
    x = {
        "gaussian": lambda: rng.standard_normal((rows, k)),
        "heavy-tailed": lambda: np.clip(rng.standard_t(1.2, (rows, k)), -6e4, 6e4),
        "far from zero": lambda: 3 + rng.standard_normal((rows, k)),
        "sparse": lambda: rng.standard_normal((rows, k)) * (rng.uniform(size=(rows, k)) < 0.02),
    }[shape]()
    return x.astype(np.float32)


@jax.jit(static_argnames="implementation")
def matvec(x, weight, thresholds, implementation):
    return graded_matvec(x, weight, thresholds, implementation=implementation)


def assert_close(y, expected, tolerance=TOLERANCE):
    error = np.abs(np.asarray(y) - expected).max(axis=-1)
    assert (error <= tolerance * np.abs(expected).max(axis=-1)).all()


@examples(8, in_ci=100)
@given(
    size=st.sampled_from(list(WEIGHTS)),
    rows=st.sampled_from([1, 8, MANY]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    shape=st.sampled_from(["gaussian", "heavy-tailed", "far from zero", "sparse"]),
    # No subnormal thresholds: devices differ in whether 0 reaches them.
    levels=st.lists(st.just(0.0) | st.floats(1e-6, 8), min_size=4, max_size=4),
    spread=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_equals_dequantization_by_level_and_multiplication(size, rows, dtype, shape, levels, spread, seed):
    weight = WEIGHTS[size]
    x = jnp.asarray(activations(rows, weight.in_features, seed, shape)).astype(dtype)
    thresholds = np.sort(np.array(levels[: weight.num_planes]))
    thresholds = (thresholds * np.linspace(1 - spread / 2, 1, rows)[:, None]).astype(np.float32)
    exact = matvec_oracle.graded_matvec(x, weight, thresholds)
    for implementation in ("reference", "xla"):
        y, realised = matvec(x, weight, thresholds, implementation)
        assert y.dtype == realised.dtype == jnp.float32
        assert_close(y, exact.y)
        np.testing.assert_allclose(realised, exact.bits, rtol=1e-6)


@pytest.mark.parametrize("rows", range(1, 9))
def test_each_row_of_a_small_batch_equals_the_row_alone(rows):
    x = activations(rows)
    thresholds = THRESHOLDS * np.linspace(0.2, 2, rows, dtype=np.float32)[:, None]
    y, bits = matvec(x, WEIGHT, thresholds, "xla")
    for row in range(rows):
        alone, alone_bits = matvec(x[row], WEIGHT, thresholds[row], "xla")
        assert alone.shape == (600,)
        assert alone_bits.shape == ()
        np.testing.assert_array_equal(y[row], alone)
        assert bits[row] == alone_bits


@implementations
@examples(10, in_ci=125)
@given(
    start=st.lists(st.floats(0, 4, width=32), min_size=4, max_size=4),
    rise=st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4),
)
def test_higher_thresholds_never_read_more(implementation, start, rise):
    x = activations(1)
    low = np.sort(np.array(start, np.float32))
    high = np.maximum.accumulate(low + np.array(rise, np.float32))
    assert matvec(x, WEIGHT, high, implementation)[1] <= matvec(x, WEIGHT, low, implementation)[1]


@implementations
@all_rows
def test_zero_thresholds_give_the_dense_product(implementation, rows):
    x = activations(rows)
    y, bits = matvec(x, WEIGHT, np.zeros(4, np.float32), implementation)
    assert_close(y, x.astype(np.float64) @ matvec_oracle.dequantize(WEIGHT, 4))
    np.testing.assert_array_equal(bits, np.full(rows, 8))


@implementations
@all_rows
@pytest.mark.parametrize("thresholds", [np.zeros(4, np.float32), THRESHOLDS])
def test_zero_activations_give_exactly_zero(implementation, rows, thresholds):
    y, bits = matvec(np.zeros((rows, 300), np.float32), WEIGHT, thresholds, implementation)
    assert not np.asarray(y).any()
    assert (np.asarray(bits) == (0 if thresholds.any() else 8)).all()


@implementations
@all_rows
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(implementation, rows, poison):
    x = activations(rows)
    clean, _ = matvec(x, WEIGHT, THRESHOLDS, implementation)
    x[-1, 299] = poison
    y, _ = matvec(x, WEIGHT, np.full(4, np.inf, np.float32), implementation)
    assert not np.isfinite(y[-1]).any()
    y, _ = matvec(x, WEIGHT, THRESHOLDS, implementation)
    assert not np.isfinite(y[-1]).any()
    np.testing.assert_array_equal(y[:-1], clean[:-1])


@implementations
@all_rows
def test_digits_beyond_the_level_do_not_change_the_output(implementation, rows):
    x = np.repeat(activations(1), rows, axis=0)
    level = np.pad(matvec_oracle.levels(x[:1], THRESHOLDS)[0], (0, 84))
    unread = level <= np.arange(4)[:, None]
    scrambled = np.where(unread[..., None], 0xDEADBEEF, np.asarray(WEIGHT.planes)).astype(np.uint32)
    assert 0.2 < unread.mean() < 0.9
    y, _ = matvec(x, WEIGHT, THRESHOLDS, implementation)
    other, _ = matvec(
        x, dataclasses.replace(WEIGHT, planes=jnp.asarray(scrambled)), THRESHOLDS, implementation
    )
    np.testing.assert_array_equal(y, other)


@implementations
@all_rows
def test_the_same_inputs_give_the_same_bytes(implementation, rows):
    x = activations(rows)
    first, second = (matvec(x, WEIGHT, THRESHOLDS, implementation)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@implementations
def test_vmap_over_rows(implementation):
    x, thresholds = activations(3), np.stack([THRESHOLDS * scale for scale in (0.5, 1, 2)])
    mapped = jax.vmap(lambda x, t: graded_matvec(x, WEIGHT, t, implementation=implementation))
    y, bits = jax.jit(mapped)(x, thresholds)
    exact = matvec_oracle.graded_matvec(x, WEIGHT, thresholds)
    assert_close(y, exact.y)
    np.testing.assert_allclose(bits, exact.bits, rtol=1e-6)


@implementations
def test_new_thresholds_do_not_recompile(implementation):
    traces = []

    @jax.jit
    def step(x, weight, thresholds):
        traces.append(thresholds)
        return graded_matvec(x, weight, thresholds, implementation=implementation)

    bits = [float(step(activations(2), WEIGHT, THRESHOLDS * scale)[1].mean()) for scale in (0, 0.3, 1, 2, 9)]
    assert len(traces) == 1
    assert bits == sorted(bits, reverse=True)
    assert len(set(bits)) == 5


def test_xla_program_depends_on_the_target_platform():
    """Only CPUs compute by channel. On a GPU every small step would be a kernel launch."""
    x = jax.ShapeDtypeStruct((1, 300), jnp.float32)
    thresholds = jax.ShapeDtypeStruct((4,), jnp.float32)
    traced = matvec.trace(x, WEIGHT, thresholds, implementation="xla")
    assert "dot_general" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "dot_general" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_levels_count_reached_thresholds():
    x = jnp.asarray([[0.0, -1.0, 1.0, -2.5, jnp.inf, jnp.nan]])
    level = grading.levels(x, jnp.asarray([0.5, 1.0, 2.0, jnp.inf]))
    np.testing.assert_array_equal(level, [[0, 2, 2, 3, 4, 4]])
    np.testing.assert_allclose(grading.realised_bits(level), [2 * 15 / 6])


@pytest.mark.parametrize(
    ("x", "thresholds", "messages"),
    [
        (np.zeros((2, 299), np.float32), np.zeros(4), [r"x has shape \(2, 299\), expected \[rows, 300\]"]),
        (np.zeros((1, 1, 300), np.float32), np.zeros(4), [r"x has shape \(1, 1, 300\)"]),
        (np.zeros((2, 300), np.int32), np.zeros(4), ["x has dtype int32, expected float32"]),
        (
            np.zeros((2, 300), np.float32),
            np.zeros(3),
            [r"thresholds has shape \(3,\), expected \(4,\) or \(2, 4\)"],
        ),
        (np.zeros((2, 300), np.float32), np.zeros((3, 4)), [r"thresholds has shape \(3, 4\)"]),
        (np.zeros(300, np.float32), np.zeros((1, 4)), [r"thresholds has shape \(1, 4\), expected \(4,\)$"]),
        (np.zeros((2, 9), np.int32), np.zeros(3), ["x has shape", "x has dtype", "thresholds has shape"]),
    ],
)
def test_refuses_wrong_arguments_by_name(x, thresholds, messages):
    # Users have no run-time check of annotations, so it is removed from the function.
    with pytest.raises(ValueError, match=r".*; ".join(messages)):
        inspect.unwrap(api.graded_matvec)(x, WEIGHT, thresholds.astype(np.float32))


def test_refuses_an_unknown_implementation_and_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown implementation 'cuda': choose from .*xla, reference"):
        inspect.unwrap(choose)(activations(1), WEIGHT, "cuda")


def test_chooses_the_first_supported_implementation_and_collects_reasons(monkeypatch):
    assert choose(activations(1), WEIGHT) == next(
        name for name, module in IMPLEMENTATIONS.items() if module.supports(activations(1), WEIGHT) is None
    )
    for name, module in IMPLEMENTATIONS.items():
        monkeypatch.setattr(module, "supports", lambda x, weight, name=name: f"no {name} today")
    with pytest.raises(NotImplementedError, match="xla: no xla today; reference: no reference today"):
        graded_matvec(activations(1), WEIGHT, THRESHOLDS)
    with pytest.raises(NotImplementedError, match=r"fits: xla: no xla today$"):
        graded_matvec(activations(1), WEIGHT, THRESHOLDS, implementation="xla")
