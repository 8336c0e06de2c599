"""The graded products of chosen experts, against the oracle of the graded matvec."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import matvec_oracle
import numpy as np
import pytest
from marks import slow

from pallas_kernels import Activations, quantize
from pallas_kernels import experts as kernels
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.experts import choose
from pallas_kernels.experts.blocks import block_rows, map_blocks

NUM_EXPERTS, IN, OUT = 5, 200, 70
experts_matvec = jax.jit(kernels.experts_matvec, static_argnames="implementation")
THRESHOLDS = np.array([0.3, 0.8, 1.5, 2.2], np.float32)


def random_experts(seed: int = 0) -> NestedExperts:
    kernels = np.random.default_rng(seed).standard_normal((NUM_EXPERTS, IN, OUT), np.float32)
    weights = [quantize(jnp.asarray(kernel)) for kernel in kernels]
    return NestedExperts(
        jnp.stack([weight.planes for weight in weights]),
        jnp.stack([weight.scales for weight in weights]),
        IN,
        OUT,
        jnp.array([0.8, 0.9, 1.05, 1.0]),
    )


def expected(x, weight: NestedExperts, experts, thresholds) -> list[matvec_oracle.Exact]:
    rows = zip(x, experts, np.broadcast_to(thresholds, (len(x), 4)), strict=True)
    return [matvec_oracle.graded_matvec(x[None], weight.expert(int(e)), t) for x, e, t in rows]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("rows", [7, *slow(1, 60)])
def test_each_row_is_read_at_its_levels_from_its_expert(implementation, rows):
    rng = np.random.default_rng(rows)
    weight, experts = random_experts(), rng.integers(0, NUM_EXPERTS - 1, rows)  # one expert is not chosen
    x = rng.standard_normal((rows, IN), np.float32)
    thresholds = THRESHOLDS * rng.uniform(0.5, 2, (rows, 1)).astype(np.float32)
    y, stats = experts_matvec(
        Activations.of(jnp.asarray(x)),
        weight,
        jnp.asarray(experts, jnp.int32),
        jnp.asarray(thresholds),
        implementation=implementation,
    )
    for row, exact in enumerate(expected(x, weight, experts, thresholds)):
        np.testing.assert_allclose(y.array[row], exact.y[0], atol=3e-5 * exact.spread.max())
        np.testing.assert_allclose(stats.bits[row], exact.bits[0], rtol=1e-6)
        np.testing.assert_allclose(stats.max_abs[row], np.abs(x[row]).max(), rtol=1e-6)


def test_leading_axes_and_the_factor_of_a_norm_are_kept():
    rng = np.random.default_rng(2)
    weight, experts = random_experts(), jnp.asarray(rng.integers(0, NUM_EXPERTS, (2, 3)), jnp.int32)
    x = jnp.asarray(rng.standard_normal((2, 3, IN), np.float32))
    squares = jnp.asarray(rng.uniform(1, 4, (2, 3, 2)).astype(np.float32))
    inputs = Activations.of(x, squares, 1e-6)
    y, stats = experts_matvec(inputs, weight, experts, jnp.asarray(THRESHOLDS))
    assert y.leading == stats.bits.shape == (2, 3)
    values = np.asarray(inputs.array).reshape(6, IN)
    exact = expected(values, weight, np.asarray(experts).ravel(), THRESHOLDS)
    np.testing.assert_allclose(y.array.reshape(6, OUT), np.concatenate([e.y for e in exact]), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (2, 4, 1), (1, 1, 3), (2, 4, 3), ()], ids=str)
def test_rows_may_share_thresholds_and_values(shape):
    rng = np.random.default_rng(4)
    weight, experts = random_experts(), jnp.asarray(rng.integers(0, NUM_EXPERTS, (2, 4, 3)), jnp.int32)
    x = jnp.asarray(rng.standard_normal((2, 4, 1, IN)), jnp.float32)
    squares = jnp.asarray(rng.uniform(1, 4, (2, 4, 3, 1)), jnp.float32)
    thresholds = jnp.asarray(THRESHOLDS * rng.uniform(0.5, 2, (*shape, 1) if shape else 1), jnp.float32)
    shared = Activations.of(x, squares, repeats=3)
    y, stats = experts_matvec(shared, weight, experts, thresholds)
    copied = Activations.of(jnp.repeat(x, 3, axis=2), squares)
    whole = jnp.broadcast_to(thresholds, (2, 4, 3, 4))
    expected_y, expected_stats = experts_matvec(copied, weight, experts, whole)
    np.testing.assert_array_equal(y.array, expected_y.array)
    np.testing.assert_array_equal(stats.packed, expected_stats.packed)


@pytest.mark.parametrize("rows", [4, 400])
def test_only_chosen_experts_are_read(rows):
    """Experts that no row has may hold scales of infinity."""
    weight = random_experts()
    damaged = dataclasses.replace(weight, scales=weight.scales.at[3].set(jnp.inf))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((rows, IN), np.float32))
    experts = jnp.arange(rows) % 3
    y, _ = experts_matvec(Activations.of(x), damaged, experts, jnp.asarray(THRESHOLDS))
    y_of_whole, _ = experts_matvec(Activations.of(x), weight, experts, jnp.asarray(THRESHOLDS))
    np.testing.assert_array_equal(y.array, y_of_whole.array)


@pytest.mark.parametrize("rows", [1, 9, 300])
def test_blocks_hold_all_rows_of_their_expert_once(rows):
    experts = np.random.default_rng(rows).integers(0, 7, rows)

    @jax.jit
    def run(values, experts):
        def block(expert, values):
            return jnp.stack([values, jnp.full(len(values), expert, jnp.float32)], axis=1)

        return map_blocks(block, values, experts, num_experts=7, outputs=2)

    y = run(jnp.arange(1, rows + 1, dtype=jnp.float32), jnp.asarray(experts))
    np.testing.assert_array_equal(y, np.stack([np.arange(1, rows + 1), experts], axis=1))
    assert 8 <= block_rows(rows, 7) <= 128


def test_arguments_that_do_not_fit_are_named():
    weight, x = random_experts(), Activations.of(jnp.zeros((2, IN + 1)))
    with pytest.raises(ValueError, match=r"201 features, expected 200.*experts is int32 \(3,\).*thresholds"):
        kernels.experts_matvec(x, weight, jnp.zeros(3, jnp.int32), jnp.zeros((3, 4)))
    with pytest.raises(
        ValueError, match=r"unknown implementation 'cuda': choose from mosaic_gpu, xla, reference"
    ):
        # Users have no run-time check of annotations, so it is removed from the function.
        inspect.unwrap(choose)(jnp.zeros((2, IN)), weight, "cuda")
