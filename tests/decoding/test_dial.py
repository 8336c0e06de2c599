"""The dial in use: it starts where it is asked, and follows the text."""

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


def all_read(model, rows, steps, bits):
    """``[rows, steps, linears]`` of one number of bits."""
    return np.broadcast_to(np.reshape(bits, (rows, -1, 1)), (rows, steps, len(linear_names(model.config))))


def test_before_anything_is_read_it_stands_where_it_is_asked(model):
    dial = Dial(model, TARGETS, np.array([2.0, 3.3]))
    np.testing.assert_array_equal(dial.setting, [2.0, 3.3])
    expected = model_thresholds(model, jnp.array(TARGETS), jnp.array([2.0, 3.3]))
    for name, thresholds in dial.thresholds.items():
        np.testing.assert_array_equal(thresholds, expected[name])


def test_the_mean_of_a_text_that_reads_more_comes_to_what_was_asked(model):
    dial = Dial(model, TARGETS, np.array([3.0, 3.0]))
    read = []
    for _ in range(40):
        here = dial.setting + np.array(
            [0.3, -0.2]
        )  # one text reads 0.3 bits more than the dial says, one 0.2 less
        read.append(here)
        dial.observe(all_read(model, 2, 16, here), np.array([16, 16]))
    np.testing.assert_allclose(dial.setting, [2.7, 3.2], atol=0.01)
    np.testing.assert_allclose(np.mean(read, axis=0), 3.0, atol=0.04)
    assert (np.diff(np.abs(np.array(read) - 3.0), axis=0) <= 1e-12).all()  # and never overshoots


def test_it_follows_what_was_read_at_an_earlier_setting(model):
    """As on a GPU: when a chunk is asked for, the one before it is not known yet."""
    dial = Dial(model, TARGETS, np.array([3.0]))
    settings = [dial.setting, dial.setting]
    for i in range(20):
        dial.observe(all_read(model, 1, 16, settings[i] + 0.3), np.array([16]), settings[i])
        expected = 0.3 * 16 * (i + 1) / (16 * (i + 1) + PRIOR_TOKENS)
        np.testing.assert_allclose(dial.setting, 3.0 - expected, rtol=1e-6)
        settings.append(dial.setting)


def test_only_tokens_that_count_do_and_rows_are_independent(model):
    dial = Dial(model, TARGETS, np.array([3.0, 3.0]))
    bits = np.array(all_read(model, 2, 16, [4.0, 8.0]))
    bits[0, 8:] = 100
    dial.observe(bits, np.array([8, 0]))
    np.testing.assert_allclose(dial.setting, [3.0 - 8 / (8 + PRIOR_TOKENS), 3.0])


def test_a_layer_counts_by_its_size(model):
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


def test_it_stays_in_the_range_of_the_tables(model):
    dial = Dial(model, TARGETS, np.array([TARGETS[0], TARGETS[-1]]))
    dial.observe(all_read(model, 2, 16, [8.0, 1.0]), np.array([16, 16]))
    np.testing.assert_array_equal(dial.setting, [TARGETS[0], TARGETS[-1]])
