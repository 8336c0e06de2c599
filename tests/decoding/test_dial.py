"""The dial starts at the wanted bits and corrects its setting by the bits that were read."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import TARGETS, graded_model

from grinqh_jax.decoding.dial import PRIOR_TOKENS, Dial, layer_shares
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.model.decoder import linear_names


@pytest.fixture(scope="module")
def model():
    return graded_model("qwen3-tied-gqa")


def constant_bits(model, rows, steps, bits):
    """``[rows, steps, linears]``, the same bits for all steps and layers of a row."""
    return np.broadcast_to(np.reshape(bits, (rows, -1, 1)), (rows, steps, len(linear_names(model.config))))


def test_the_first_setting_is_the_wanted_bits(model):
    dial = Dial(model, TARGETS, np.array([2.0, 3.3]))
    np.testing.assert_array_equal(dial.setting, [2.0, 3.3])
    expected = model_thresholds(model, jnp.array(TARGETS), jnp.array([2.0, 3.3]))
    for name, thresholds in dial.thresholds.items():
        np.testing.assert_array_equal(thresholds, expected[name])


def test_the_mean_of_an_unusual_text_approaches_the_wanted_bits(model):
    dial = Dial(model, TARGETS, np.array([3.0, 3.0]))
    read = []
    for _ in range(40):
        # The first row reads 0.3 bits more than the setting, the second 0.2 bits less.
        bits = dial.setting + np.array([0.3, -0.2])
        read.append(bits)
        dial.observe(constant_bits(model, 2, 16, bits), np.array([16, 16]))
    np.testing.assert_allclose(dial.setting, [2.7, 3.2], atol=0.01)
    np.testing.assert_allclose(np.mean(read, axis=0), 3.0, atol=0.04)
    assert (np.diff(np.abs(np.array(read) - 3.0), axis=0) <= 1e-12).all()  # without overshooting


def test_it_observes_chunks_of_an_earlier_setting(model):
    """As on a GPU, where a chunk is launched before the previous one has arrived."""
    dial = Dial(model, TARGETS, np.array([3.0]))
    settings = [dial.setting, dial.setting]
    for i in range(20):
        dial.observe(constant_bits(model, 1, 16, settings[i] + 0.3), np.array([16]), settings[i])
        expected = 0.3 * 16 * (i + 1) / (16 * (i + 1) + PRIOR_TOKENS)
        np.testing.assert_allclose(dial.setting, 3.0 - expected, rtol=1e-6)
        settings.append(dial.setting)


def test_padding_is_ignored_and_rows_are_independent(model):
    dial = Dial(model, TARGETS, np.array([3.0, 3.0]))
    bits = np.array(constant_bits(model, 2, 16, [4.0, 8.0]))
    bits[0, 8:] = 100
    dial.observe(bits, np.array([8, 0]))
    np.testing.assert_allclose(dial.setting, [3.0 - 8 / (8 + PRIOR_TOKENS), 3.0])


def test_a_layer_is_weighted_by_its_size(model):
    shares = layer_shares(model.config)
    assert shares.sum() == pytest.approx(1)
    linears = [model.linear(name) for name in linear_names(model.config)]
    sizes = np.array([linear.in_features * linear.out_features for linear in linears])
    np.testing.assert_allclose(shares, sizes / sizes.sum())
    dial = Dial(model, TARGETS, np.array([3.0]))
    bits = np.full((1, 16, len(shares)), 3.0)
    bits[..., -1] = 4.0
    dial.observe(bits, np.array([16]))
    np.testing.assert_allclose(3.0 - dial.setting, shares[-1] * 16 / (16 + PRIOR_TOKENS))


def test_it_stays_in_the_range_of_the_targets(model):
    dial = Dial(model, TARGETS, np.array([TARGETS[0], TARGETS[-1]]))
    dial.observe(constant_bits(model, 2, 16, [8.0, 1.0]), np.array([16, 16]))
    np.testing.assert_array_equal(dial.setting, [TARGETS[0], TARGETS[-1]])
