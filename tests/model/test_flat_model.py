"""Models and thresholds packed into few arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import TARGETS, graded_model

from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.model.stacks import unstacked


@pytest.fixture(scope="module")
def model():
    return graded_model("qwen3-tied-gqa")


def test_a_flat_model_holds_the_same_model_in_fewer_arrays(model):
    flat = FlatModel(model)
    leaves, structure = jax.tree.flatten(model)
    assert len(jax.tree.leaves(flat)) < len(leaves) / 2
    again, same = jax.tree.flatten(jax.jit(lambda flat: flat.module)(flat))
    assert same == structure
    for leaf, other in zip(leaves, again, strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def test_large_arrays_are_not_copied(model, monkeypatch):
    monkeypatch.setattr("grinqh_jax.model.flat_model.SMALL_BYTES", 64)
    flat = FlatModel(model)
    large = [leaf for leaf in jax.tree.leaves(model) if leaf.nbytes > 64]
    assert {id(leaf) for leaf in large} <= {id(array) for array in flat.arrays}


def test_two_flat_models_of_a_shape_share_a_program(model):
    count = jax.jit(lambda flat: flat.module.norm.scale[...].sum())
    count(FlatModel(model))
    count(FlatModel(model))
    assert count._cache_size() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_unstacked_members_equal_the_stack(dtype):
    stack = jnp.arange(-6, 6).reshape(3, 2, 2).astype(dtype)
    for member, expected in zip(jax.jit(unstacked)(stack), stack, strict=True):
        np.testing.assert_array_equal(member, expected)


def test_unstacking_keeps_infinities_and_a_nan_in_the_first_member():
    stack = jnp.array([[np.inf, 1.0], [2.0, -np.inf]])
    np.testing.assert_array_equal(jnp.stack(unstacked(stack)), stack)
    assert np.isnan(jnp.stack(unstacked(stack.at[0, 0].set(np.nan)))).all()


def test_stacked_thresholds_are_a_mapping_and_one_array(model):
    thresholds = model_thresholds(model, jnp.array(TARGETS), jnp.array([2.0, 3.3]))
    assert len(jax.tree.leaves(thresholds)) == 1
    assert list(thresholds) == linear_names(model.config)
    by_name = jax.jit(lambda thresholds: thresholds.by_name())(thresholds)
    assert by_name.keys() == thresholds.keys()
    for name, rows in thresholds.items():
        assert rows.shape == (2, model.linear(name).weight.num_planes)
        np.testing.assert_array_equal(rows, by_name[name])
    with pytest.raises(KeyError, match=r"layers\.9\.qkv"):
        thresholds["layers.9.qkv"]
