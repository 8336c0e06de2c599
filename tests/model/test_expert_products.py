"""Products of rows with unquantized experts, against NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.model import expert_products, experts
from pallas_kernels.experts.batches import batch_rows

DISTRIBUTIONS = {
    "uneven": [3, 0, 3, 2, 3],
    "all rows at one expert": [2] * 50,
    "rows outside of the group": [4, 1, 4, 0, 0, 4, 4, 1],
    "all rows outside": [4] * 9,
}
"""Expert of each row, of four. Rows of expert 4 get zeros."""


def exact(x, kernel, chosen, axes="rk,rkn->rn"):
    kernel = np.concatenate([np.asarray(kernel, np.float64), np.zeros((1, *kernel.shape[1:]))])
    return np.einsum(axes, np.asarray(x, np.float64), kernel[np.asarray(chosen)])


def random(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def as_bits(kernel):
    return jax.lax.bitcast_convert_type(kernel, jnp.uint16)


@pytest.mark.parametrize(
    "function", [partial(expert_products._in_blocks, num_experts=4), expert_products._row_by_row]
)
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.uint16])
def test_each_row_is_multiplied_by_its_expert(function, stored):
    """uint16 numbers are the bits of bfloat16. Expert 1 has no row, expert 3 has several."""
    chosen = DISTRIBUTIONS["uneven"]
    x, kernel = random(5, 40), random(4, 40, 24)
    expected = exact(x, kernel, chosen)
    y = jax.jit(function)(
        x, as_bits(kernel) if stored == jnp.uint16 else kernel.astype(stored), jnp.asarray(chosen)
    )
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("capacity", [1, 3, 8, 64])
def test_batches_have_all_rows_of_any_distribution(monkeypatch, distribution, dtype, transposed, capacity):
    """One batch is enough for the largest capacity; the smallest needs a batch for each row of an expert."""
    monkeypatch.setattr(expert_products, "batch_rows", lambda rows, num_experts: capacity)
    chosen = DISTRIBUTIONS[distribution]
    x, kernel = random(len(chosen), 40, dtype=dtype), random(4, 40, 24, dtype=dtype)
    expected = exact(x, kernel, chosen)
    stored = kernel.transpose(0, 2, 1) if transposed else kernel
    product = partial(expert_products.all_at_once, num_experts=4, transposed=transposed)
    y = jax.jit(product)(x, stored, jnp.asarray(chosen))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it(monkeypatch):
    """A row is alone at its expert, or in one of five batches."""
    monkeypatch.setattr(expert_products, "batch_rows", lambda rows, num_experts: 8)
    x, kernel = random(40, 64, dtype=jnp.float32), random(4, 64, 48, dtype=jnp.float32)
    product = jax.jit(partial(expert_products.all_at_once, num_experts=4))
    alone = product(x, kernel, jnp.asarray([1] + [0] * 39))[0]
    for place in (0, 13, 39):
        among = product(jnp.roll(x, place, axis=0), kernel, jnp.full(40, 1))[place]
        np.testing.assert_array_equal(among, alone)


@pytest.mark.parametrize(
    ("tokens", "chosen", "num_experts", "capacity"),
    [(16, 8, 128, 16), (64, 8, 128, 64), (512, 8, 128, 128), (2048, 8, 128, 256), (2048, 2, 8, 1024)],
)
def test_a_batch_has_rows_for_more_than_the_mean(tokens, chosen, num_experts, capacity):
    """Up to 128 tokens of Qwen3-30B-A3B one batch is enough: a token chooses an expert at most once."""
    assert batch_rows(tokens * chosen, num_experts) == capacity


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.uint16])
def test_gradients_are_those_of_the_expert_of_each_row(stored):
    chosen = np.resize(DISTRIBUTIONS["rows outside of the group"], 136)
    kernel, x, weights = random(4, 40, 24), random(136, 40), random(136, 24)
    expected = exact(weights, kernel, chosen, "rn,rkn->rk")
    kernel = as_bits(kernel) if stored == jnp.uint16 else kernel.astype(stored)

    def total(x):
        return jnp.sum(expert_products.jitted_matmul(x, kernel, jnp.asarray(chosen), 4) * weights)

    gradient = jax.grad(total)(x)
    assert gradient.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_rows_of_experts_outside_of_a_group_get_zeros():
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.standard_normal((6, 40, 24)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((6, 24)), jnp.float32)
    x, chosen = jnp.asarray(rng.standard_normal((3, 2, 40)), jnp.float32), rng.integers(0, 6, (3, 2))
    chosen[0], factors = (1, 3), jnp.asarray(rng.uniform(0.5, 1, (3, 2)), jnp.float32)
    whole = experts.DenseExperts(kernel, bias).choose(jnp.asarray(chosen), factors)
    group = experts.DenseExperts(kernel[2:5], bias, first=2, num_experts=6)
    of_group = group.choose(jnp.asarray(chosen), factors)
    is_held = (chosen >= 2) & (chosen < 5)
    np.testing.assert_array_equal(of_group.is_held, is_held)
    assert whole.is_held is None
    expected = np.where(is_held[..., None], whole.dense(x), 0)
    np.testing.assert_allclose(of_group.dense(x), expected, rtol=1e-5, atol=1e-5)
