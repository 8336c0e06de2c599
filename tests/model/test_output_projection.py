"""The output projection in vocabulary blocks against the dense one."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import graded_model_tree

from grinqh_jax.model.apply import Dense
from grinqh_jax.model.output_projection import OutputProjection, block_sizes
from pallas_kernels import Activations

HIDDEN, VOCABULARY = 128, 2600
KERNEL = np.random.default_rng(0).standard_normal((HIDDEN, VOCABULARY)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 3, HIDDEN)).astype(np.float32)
INPUTS = Activations.of(jnp.asarray(X))


def projection(tree) -> OutputProjection:
    return OutputProjection(tree, KERNEL.shape, jnp.float32)


@pytest.fixture(scope="module")
def graded() -> OutputProjection:
    return projection(graded_model_tree({"lm_head": {"kernel": KERNEL}})["lm_head"])


def test_logits_are_in_the_order_of_the_tokens(graded):
    assert len(graded.blocks) == len(block_sizes(VOCABULARY)) == 3
    exact = X.astype(np.float64) @ KERNEL
    error = np.asarray(graded(INPUTS, Dense())) - exact  # error of 8-bit codes
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact)


def test_tokens_are_those_of_the_outputs(graded):
    outputs, tokens = np.asarray(graded.outputs(INPUTS, Dense())), np.asarray(graded.tokens())
    logits = np.asarray(graded(INPUTS, Dense()))
    assert sorted(tokens) == list(range(VOCABULARY)) != tokens.tolist()
    np.testing.assert_array_equal(logits[..., tokens], outputs)


def test_a_dense_projection_is_in_order():
    dense = projection({"kernel": KERNEL})
    assert dense.tokens().tolist() == list(range(VOCABULARY))
    np.testing.assert_array_equal(dense.outputs(INPUTS, Dense()), dense(INPUTS, Dense()))
