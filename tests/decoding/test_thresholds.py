"""Interpolation of thresholds between the targets of a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import TARGETS, graded_model

from grinqh_jax.decoding.thresholds import interpolate, model_thresholds
from grinqh_jax.model import decoder

TABLE = jnp.array([[4.0, 8.0], [2.0, 6.0], [0.0, 1.0]])
GRID = (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (1.0, [4, 8]),
        (1.25, [3.5, 7.5]),
        (2.0, [2, 6]),
        (2.5, [1, 3.5]),
        (3.0, [0, 1]),
        (0.2, [4, 8]),
        (9, [0, 1]),
    ],
)
def test_interpolates_between_targets_and_clamps_at_the_ends(bits, expected):
    np.testing.assert_allclose(interpolate(TABLE, GRID, bits), expected, rtol=1e-6)


def test_bits_of_several_rows_may_be_traced():
    rows = jax.jit(interpolate)(TABLE, jnp.array(GRID), jnp.array([1.25, 2.5]))
    np.testing.assert_allclose(rows, [[3.5, 7.5], [1, 3.5]], rtol=1e-6)


def test_model_thresholds_cover_every_linear_layer_and_ascend():
    model = graded_model("qwen3-tied-gqa")
    thresholds = model_thresholds(model, jnp.array(TARGETS), jnp.array([1.7, 6.3, 8.0]))
    assert set(thresholds) == set(decoder.linear_names(model.config))
    for name, rows in thresholds.items():
        table = model.linear(name).thresholds[...]
        np.testing.assert_allclose(rows, interpolate(table, TARGETS, [1.7, 6.3, 8.0]), atol=1e-6)
        assert np.all(np.diff(rows, axis=-1) >= 0)
        assert np.all(rows[2] == 0)
