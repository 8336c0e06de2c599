"""The dial starts at the wanted bits and corrects its setting by the bits that were read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import TARGETS, graded_model

from grinqh_jax.decoding.dial import PRIOR_TOKENS, REPAYMENT_TOKENS, SKIPPED_POSITIONS, Dial, layer_shares
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.errors import UsageError
from grinqh_jax.model.decoder import linear_names

LATER = 20
"""A position whose bits are like those of later ones."""


@pytest.fixture(scope="module")
def model():
    return graded_model("qwen3-tied-gqa")


def constant_bits(model, *shape_and_bits):
    """``[*shape, linears]``, the same bits for all layers; the last argument broadcasts to the shape."""
    *shape, bits = shape_and_bits
    linears = len(linear_names(model.config))
    return np.broadcast_to(np.asarray(bits, np.float32)[..., None], (*shape, linears))


def step(dial, model, bits, active=None, position=LATER):
    rows = len(dial.state.wanted)
    active = np.ones(rows, bool) if active is None else np.array(active)
    return dial.follow(
        jnp.asarray(constant_bits(model, rows, bits)), jnp.asarray(active), jnp.full(rows, position)
    )


def test_the_first_setting_is_the_wanted_bits(model):
    dial = Dial.create(model, TARGETS, [2.0, 3.3])
    np.testing.assert_allclose(dial.setting, [2.0, 3.3])
    expected = model_thresholds(model, jnp.array(TARGETS), jnp.array([2.0, 3.3]))
    for name, thresholds in dial.thresholds.items():
        np.testing.assert_allclose(thresholds, expected[name], rtol=1e-6)


def test_bits_out_of_range_are_refused(model):
    with pytest.raises(UsageError, match="bits 9: this checkpoint's dial goes from"):
        Dial.create(model, TARGETS, [2.0, 9.0])


def test_the_rule_equals_numpy(model):
    """A preview, then decode steps of three rows, of which each pauses now and then."""
    rng, rows = np.random.default_rng(0), 3
    shares = layer_shares(model.config)
    wanted, (excess, tokens, debt, decoded) = np.array([2.0, 3.0, 7.5]), np.zeros((4, rows))
    dial = Dial.create(model, TARGETS, wanted)

    def setting():
        exact = wanted - excess / (tokens + PRIOR_TOKENS) - debt / np.maximum(decoded - 12, REPAYMENT_TOKENS)
        return np.clip(exact, TARGETS[0], TARGETS[-1])

    preview, counts = rng.uniform(0, 8, (rows, 12, len(shares))).astype(np.float32), np.array([12, 0, 5])
    dial = dial.observe(jnp.asarray(preview), jnp.asarray(counts))
    for row, count in enumerate(counts):
        excess[row] += np.sum(preview[row, :count] @ shares - wanted[row])
    tokens += counts
    for i in range(60):
        bits = rng.uniform(0, 8, (rows, len(shares))).astype(np.float32)
        active, positions = rng.random(rows) < 0.8, np.array([i, i + 2, i + 100])
        before = setting()
        np.testing.assert_allclose(dial.setting, before, atol=1e-4)
        dial = dial.follow(bits, active, positions)
        read, observed = bits @ shares, active & (positions >= SKIPPED_POSITIONS)
        excess += np.where(observed, read - before, 0)
        tokens += observed
        debt += np.where(active, read - wanted, 0)
        decoded += active
    np.testing.assert_allclose(dial.state.debt, debt, atol=1e-3)
    np.testing.assert_allclose(dial.state.excess, excess, atol=1e-3)
    np.testing.assert_array_equal(dial.state.tokens, tokens)
    np.testing.assert_array_equal(dial.state.decoded, decoded)
    again = dial.with_state(dial.state.next_answer())
    np.testing.assert_allclose(
        again.setting, np.clip(wanted - excess / (tokens + PRIOR_TOKENS), TARGETS[0], TARGETS[-1]), atol=1e-4
    )


def test_a_short_answer_on_an_unusual_text_reads_the_wanted_mean(model):
    """The first row reads 0.3 bits more than the setting, the second 0.4 less; nothing was known before."""
    dial, read, offset = Dial.create(model, TARGETS, [3.0, 3.0]), [], np.array([0.3, -0.4])
    for _ in range(200):
        read.append(np.asarray(dial.setting) + offset)
        dial = step(dial, model, read[-1])
    for tokens, tolerance in ((20, 0.1), (200, 0.03)):
        np.testing.assert_allclose(np.mean(read[:tokens], axis=0), 3.0, atol=tolerance)
    np.testing.assert_allclose(read[-1], 3.0, atol=0.02)


def test_first_positions_add_debt_but_no_excess(model):
    dial = step(Dial.create(model, TARGETS, [3.0]), model, 1.0, position=SKIPPED_POSITIONS - 1)
    assert (dial.state.tokens.tolist(), dial.state.excess.tolist()) == ([0], [0])
    np.testing.assert_allclose(dial.setting, 3 + 2 / REPAYMENT_TOKENS)


def test_an_observed_window_is_not_paid_back(model):
    dial = Dial.create(model, TARGETS, [3.0])
    for _ in range(20):
        bits = np.asarray(dial.setting)[0] + 0.3
        dial = dial.observe(jnp.asarray(constant_bits(model, 1, 16, bits)), jnp.array([16]))
    np.testing.assert_allclose(dial.state.debt, 0)
    np.testing.assert_allclose(dial.setting, 3 - 0.3 * 320 / (320 + PRIOR_TOKENS), rtol=1e-5)


def test_padding_and_paused_rows_are_ignored(model):
    dial = Dial.create(model, TARGETS, [3.0, 3.0])
    bits = np.array(constant_bits(model, 2, 16, [[4.0], [8.0]]))
    bits[0, 8:] = 100
    dial = dial.observe(jnp.asarray(bits), jnp.array([8, 0]))
    np.testing.assert_allclose(dial.setting, [3.0 - 8 / (8 + PRIOR_TOKENS), 3.0], rtol=1e-6)
    paused = step(dial, model, 8.0, active=[False, False])
    jax.tree.map(np.testing.assert_array_equal, paused.state, dial.state)


def test_a_row_does_not_depend_on_the_others(model):
    """Bit for bit: sums over layers and over the tokens of a preview are exact."""
    rng, linears = np.random.default_rng(1), len(linear_names(model.config))
    bits = rng.uniform(0, 8, (20, 4, linears)).astype(np.float32)
    preview, wanted = rng.uniform(0, 8, (4, 64, linears)).astype(np.float32), [1.7, 3.0, 5.1, 2.2]

    def states(rows):
        dial = Dial.create(model, TARGETS, [wanted[row] for row in rows])
        dial = dial.observe(preview[rows], np.array([64, 3, 50, 0])[rows])
        for one in bits[:, rows]:
            dial = dial.follow(one, np.ones(len(rows), bool), np.full(len(rows), LATER))
        return np.asarray(dial.thresholds.rows)

    together = states([0, 1, 2, 3])
    for row in range(4):
        np.testing.assert_array_equal(states([row])[0], together[row])


def test_a_layer_is_weighted_by_its_size(model):
    shares = layer_shares(model.config)
    assert shares.sum() == pytest.approx(1)
    linears = [model.linear(name) for name in linear_names(model.config)]
    sizes = np.array([linear.in_features * linear.out_features for linear in linears])
    np.testing.assert_allclose(shares, sizes / sizes.sum())
    bits = np.full((1, 16, len(shares)), 3.0, np.float32)
    bits[..., -1] = 4.0
    dial = Dial.create(model, TARGETS, [3.0]).observe(jnp.asarray(bits), jnp.array([16]))
    np.testing.assert_allclose(3.0 - dial.setting, shares[-1] * 16 / (16 + PRIOR_TOKENS), atol=1e-5)


def test_it_stays_in_the_range_of_the_targets(model):
    dial = Dial.create(model, TARGETS, [TARGETS[0], TARGETS[-1]])
    dial = step(dial, model, np.array([8.0, 1.0]))
    np.testing.assert_array_equal(dial.setting, [TARGETS[0], TARGETS[-1]])
