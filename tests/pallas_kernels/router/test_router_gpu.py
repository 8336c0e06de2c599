"""The router on a GPU (``pytest -m gpu``), alone and in front of the products of experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts_cases import ExpertsCase
from marks import slow
from router_cases import EPS, RouterCase, assert_agrees_with_oracle

from grinqh_jax.model.experts import Router
from grinqh_jax.model.gated_mlp import gated_experts
from grinqh_jax.model.layer_spec import GatedExperts
from pallas_kernels import Activations, decode_rows, router
from pallas_kernels.experts import experts_matvec

pytestmark = pytest.mark.gpu

CASES = [
    RouterCase(1, 2048, 128, 8),
    RouterCase(16, 2048, 128, 8, num_square_partials=37),
    RouterCase(4, 4096, 128, 8, num_square_partials=0),
    RouterCase(2, 2048, 60, 4, normalized=False),
    RouterCase(1, 2048, 64, 8, normalized=False, dtype="float32"),
    RouterCase(5, 72, 30, 1, num_square_partials=1),
    RouterCase(1, 200, 100, 32),
    *slow(RouterCase(3, 4096, 8, 2), RouterCase(2, 2048, 512, 10)),
]


@pytest.fixture(autouse=True)
def _gpu():
    if jax.default_backend() != "gpu":
        pytest.fail("these tests need an NVIDIA GPU")


@functools.partial(jax.jit, static_argnames=("chosen", "normalized"))
def run(x, squares, kernel, chosen, normalized):
    inputs = Activations.of(x, squares, EPS if squares is not None else 0.0)
    routed = router.route(inputs, kernel, chosen, normalized=normalized)
    return routed.experts, routed.probabilities, routed.inputs.square_partials[..., 0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64_and_repeats(case):
    arrays = case.arrays()
    results = run(*arrays, case.chosen, case.normalized)
    assert_agrees_with_oracle(case, arrays, *map(np.asarray, results))
    for _ in range(20):
        for array, again in zip(results, run(*arrays, case.chosen, case.normalized), strict=True):
            np.testing.assert_array_equal(array, again)


def test_rows_do_not_depend_on_other_rows():
    case = RouterCase(16, 2048, 128, 8)
    x, squares, kernel = case.arrays()
    together = run(x, squares, kernel, 8, True)
    for row in (0, 15):
        one = slice(row, row + 1)
        for array, alone in zip(together, run(x[one], squares[one], kernel, 8, True), strict=True):
            np.testing.assert_array_equal(array[one], alone)


@pytest.mark.parametrize("rows", [5, *slow(1)])
def test_a_mixture_is_the_same_with_and_without_its_kernels(monkeypatch, rows):
    """Router, products of experts and SwiGLU, from the same norm; at full bits, so no level differs."""
    chosen, experts = 4, 12
    _, gate_up, *_ = ExpertsCase(512, 768, 1, experts, dtype="bfloat16").arrays()
    _, down, *_ = ExpertsCase(384, 512, 1, experts, dtype="bfloat16", seed=1).arrays()
    x, squares, kernel = RouterCase(rows, 512, experts, chosen).arrays()
    mixture, all_bits = GatedExperts(chosen=chosen, normalized=True), jnp.zeros(4)

    def mix(x, squares, kernel, gate_up, down):
        routed = Router(kernel)(Activations.of(x, squares, EPS), mixture)
        outputs, _ = experts_matvec(routed.inputs, gate_up, routed.experts, all_bits)
        mixed = gated_experts(outputs.scaled(1e-3).astype(jnp.bfloat16), routed.probabilities)
        y, stats = experts_matvec(mixed, down, routed.experts, all_bits)
        return routed.experts, y.summed().array, stats.max_abs

    arguments = jax.tree.map(jnp.asarray, (x, squares, kernel, gate_up, down))
    text = jax.jit(mix).lower(*arguments).as_text()
    assert "router_kernel" in text
    assert "swiglu_experts_kernel" in text
    chosen_experts, y, max_abs = jax.jit(mix)(*arguments)
    monkeypatch.setattr(router, "supports", lambda *_: "switched off")
    monkeypatch.setattr(decode_rows, "supports_rows", lambda *_: "switched off")
    expected_experts, expected, expected_max_abs = jax.jit(lambda *a: mix(*a))(*arguments)
    np.testing.assert_array_equal(chosen_experts, expected_experts)
    assert np.linalg.norm(y - expected) < 2e-2 * np.linalg.norm(expected)
    np.testing.assert_allclose(max_abs, expected_max_abs, rtol=0.1)
