"""Histograms and thresholds: the mean bits asked for, by the optimal allocation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from checkpoints_tools.calibration import histogram
from checkpoints_tools.calibration.allocation import (
    UNSEEN,
    GradedCosts,
    mean_bits,
    smooth_sensitivities,
    target_grid,
    threshold_ratios,
    threshold_tables,
)
from pallas_kernels import codes, grading

GAUSSIAN_ERRORS = np.array([1.0, 0.13, 0.01, 6e-4, 4e-5])

rng = np.random.default_rng(5)
ACTIVATIONS = {
    "gaussian": rng.standard_normal((64, 1024)).astype(np.float32),
    "heavy-tailed": rng.standard_t(2.0, (64, 1024)).astype(np.float32),
    "log-normal": np.exp(3 * rng.standard_normal((64, 1024))).astype(np.float32),
    "tiny": (1e-30 * rng.standard_normal((64, 1024))).astype(np.float32),
}


def threshold_table(counts, errors, targets):
    """Returns the table of a model with one layer."""
    return threshold_tables({"layer": GradedCosts(np.asarray(counts), errors, 1)}, targets)["layer"]


@jax.jit
def realised_bits(x, table):
    """Returns the mean bits of each row of a table."""
    return jax.lax.map(lambda row: grading.realised_bits(grading.levels(x, row)).mean(), table)


def test_counts_follow_bfloat16_truncation():
    x = np.concatenate([ACTIVATIONS["heavy-tailed"].reshape(-1), [0.0, -0.0, 3e38, -np.inf, np.nan]])
    x = x.astype(np.float32)
    counts = np.asarray(histogram.count(jnp.asarray(x)))
    expected = np.bincount(np.abs(x).view(np.uint32) >> 16, minlength=histogram.BINS)
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum() == x.size


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_share_reaching_follows_the_data(name):
    x = np.abs(ACTIVATIONS[name]).reshape(-1)
    counts = np.asarray(histogram.count(jnp.asarray(x)))
    thresholds = np.quantile(x, np.linspace(0, 1, 41)).astype(np.float32)
    exact = (x[:, None] >= thresholds).mean(axis=0)
    np.testing.assert_allclose(histogram.share_reaching(counts, thresholds), exact, atol=0.002)
    assert histogram.share_reaching(counts, np.float32(0)) == 1
    assert histogram.share_reaching(counts, np.finfo(np.float32).max) == 0


def test_counts_add_up_over_batches_and_dtypes():
    x = jnp.asarray(ACTIVATIONS["gaussian"], jnp.bfloat16)
    whole = np.asarray(histogram.count(x))
    parts = sum(np.asarray(histogram.count(part)) for part in np.split(np.asarray(x), 4))
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(whole, np.asarray(histogram.count(x.astype(jnp.float32))))


@pytest.mark.parametrize("max_bits", [2, 4, 6, 8])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_target_is_met_on_the_calibration_data(name, max_bits):
    x = ACTIVATIONS[name]
    targets = target_grid(max_bits)
    table = threshold_table(
        np.asarray(histogram.count(jnp.asarray(x))), GAUSSIAN_ERRORS[: max_bits // 2 + 1], targets
    )
    assert table.dtype == np.float32
    assert np.isfinite(table).all()
    np.testing.assert_allclose(realised_bits(x, table), targets, rtol=0, atol=0.01)
    assert (table[-1] == 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    assert (np.diff(table, axis=0) < 0).all()


def test_the_targets_rise_in_quarters_to_all_bits():
    assert target_grid(8) == tuple(1 + 0.25 * i for i in range(29))
    assert target_grid(2) == (1.0, 1.25, 1.5, 1.75, 2.0)


errors_strategy = st.lists(st.floats(1e-6, 10), min_size=2, max_size=5)


@given(errors=errors_strategy, exponent=st.floats(-6, 6))
@examples(200)
def test_thresholds_choose_the_least_cost_for_every_activation(errors, exponent):
    """Compares with brute force over the levels, including errors that rise or are not convex."""
    errors = np.array(errors)
    penalty = 10.0**exponent
    ratios = threshold_ratios(errors)
    assert (np.diff(ratios) >= 0).all()
    assert (ratios > 0).all()
    assert np.isfinite(ratios).all()
    # Levels without a smaller error are read at magnitudes beyond this range.
    x = np.sqrt(penalty) * np.logspace(-3, 3, 301)
    level = (x[:, None] >= np.sqrt(penalty) * ratios).sum(axis=1)
    cost = x[:, None] ** 2 * errors + penalty * 2 * np.arange(len(errors))
    chosen = np.take_along_axis(cost, level[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, cost.min(axis=1), rtol=1e-6)


def test_a_level_that_is_never_best_shares_its_neighbours_threshold():
    ratios = threshold_ratios(np.array([1.0, 0.9, 0.1, 0.01, 0.001]))
    assert ratios[0] == ratios[1] < ratios[2] < ratios[3]


def test_dead_weights_and_dead_activations_have_finite_thresholds():
    x = np.zeros((4, 100), np.float32)
    x[0] = 1.0
    counts = np.asarray(histogram.count(jnp.asarray(x)))
    table = threshold_table(counts, np.zeros(5), (1.0, 2.0, 4.0, 8.0))
    assert np.isfinite(table).all()
    # Only a quarter of the activations is nonzero, so at most 2 bits are read; zeros are skipped.
    np.testing.assert_allclose(mean_bits(counts, table)[1:3], 2.0, atol=0.01)
    assert mean_bits(counts, table)[3] == 8
    dead = threshold_table(np.asarray(histogram.count(jnp.zeros(8))), GAUSSIAN_ERRORS, (1.0, 8.0))
    assert np.isfinite(dead).all()


def test_a_layer_that_nothing_depends_on_is_read_last():
    counts = np.asarray(histogram.count(jnp.asarray(ACTIVATIONS["gaussian"])))
    layers = {"live": GradedCosts(counts, GAUSSIAN_ERRORS, 1), "dead": GradedCosts(counts, np.zeros(5), 1)}
    tables = threshold_tables(layers, (2.0, 5.0, 8.0))
    for table in tables.values():
        assert np.isfinite(table).all()
    assert mean_bits(counts, tables["dead"])[0] == 0
    np.testing.assert_allclose(mean_bits(counts, tables["live"])[:2], (4.0, 8.0), atol=0.01)
    np.testing.assert_allclose(mean_bits(counts, tables["dead"])[1:], (2.0, 8.0), atol=0.01)


def test_a_layer_that_the_text_hardly_needs_is_not_starved():
    x = ACTIVATIONS["heavy-tailed"]
    counts = np.asarray(histogram.count(jnp.asarray(x)))
    squares = float(np.mean(np.square(x, dtype=np.float64)))
    assert histogram.mean_square(counts) == pytest.approx(squares, rel=0.01)
    errors = {"much": GAUSSIAN_ERRORS, "little": 1e-4 * GAUSSIAN_ERRORS, "none": np.zeros(5)}
    sizes = {"much": 100, "little": 300, "none": 100}
    layers = {name: GradedCosts(counts, errors[name], sizes[name]) for name in errors}
    spread = smooth_sensitivities(layers)
    # One quarter is spread over 500 weights; the 100 that nothing depends on keep errors of 0.
    before, after = (
        {name: layer.errors[0] * layer.weights for name, layer in costs.items()} for costs in (layers, spread)
    )
    total = sum(before.values())
    for name in ("much", "little"):
        expected = (1 - UNSEEN) * before[name] + UNSEEN * total * sizes[name] / 500
        assert after[name] == pytest.approx(expected)
        np.testing.assert_allclose(spread[name].errors / errors[name], after[name] / before[name])
    assert after["none"] == 0
    starved, fed = (
        mean_bits(counts, threshold_tables(costs, (2.0,))["little"]) for costs in (layers, spread)
    )
    assert starved < 1.3 < fed < 2
    alike = {name: GradedCosts(counts, GAUSSIAN_ERRORS, size) for name, size in sizes.items()}
    for name, layer in smooth_sensitivities(alike).items():
        np.testing.assert_allclose(layer.errors, alike[name].errors)


def test_bits_are_split_so_that_no_exchange_between_layers_gains():
    """Moves bits between three layers of different sizes, errors and activations."""
    generator = np.random.default_rng(1)
    samples = {
        "a": ACTIVATIONS["gaussian"],
        "b": 5 * ACTIVATIONS["heavy-tailed"],
        "c": ACTIVATIONS["gaussian"],
    }
    errors = {"a": GAUSSIAN_ERRORS, "b": 0.01 * GAUSSIAN_ERRORS**1.1, "c": 20 * GAUSSIAN_ERRORS}
    weights = {"a": 1000, "b": 5000, "c": 300}
    layers = {
        name: GradedCosts(np.asarray(histogram.count(jnp.asarray(x))), errors[name], weights[name])
        for name, x in samples.items()
    }

    def cost(name, thresholds):
        """Returns the bits of the layer's weights and its share of the divergence."""
        x = np.abs(samples[name].reshape(-1, 1)).astype(np.float64)
        level = (x >= thresholds).sum(axis=1)
        return weights[name] * 2 * level.mean(), weights[name] * (x[:, 0] ** 2 * errors[name][level]).mean()

    for target in (1.5, 3.0, 5.0):
        tables = {name: table[0] for name, table in threshold_tables(layers, (target,)).items()}
        bits, loss = map(sum, zip(*(cost(name, tables[name]) for name in layers), strict=True))
        assert abs(bits / sum(weights.values()) - target) < 0.01
        for _ in range(30):
            moved = {name: tables[name] * np.exp(0.3 * generator.standard_normal()) for name in layers}
            moved_bits, moved_loss = map(sum, zip(*(cost(n, moved[n]) for n in layers), strict=True))
            if moved_bits <= bits:
                assert moved_loss > 0.999 * loss


def test_the_allocation_beats_its_neighbours_on_a_real_product():
    """At equal mean bits, thresholds that are closer together or further apart give a larger error."""
    generator = np.random.default_rng(0)
    w = jnp.asarray(generator.standard_normal((256, 64)), jnp.float32)
    x = jnp.asarray(generator.standard_t(4, (512, 256)), jnp.float32)
    weight = codes.quantize(w)
    errors = np.asarray(codes.level_errors(w, weight), np.float64)
    counts = np.asarray(histogram.count(x))
    per_level = [codes.dequantize(weight, level) for level in range(5)]

    def output_error(thresholds):
        level = grading.levels(x, jnp.asarray(thresholds, jnp.float32))
        y = sum(jnp.where(level == i, x, 0) @ per_level[i] for i in range(5))
        return float(jnp.mean((y - x @ w) ** 2))

    table = threshold_table(counts, errors, (2.0, 3.0, 4.0))
    for target, thresholds in zip((2.0, 3.0, 4.0), table, strict=True):
        for stretch in (0.6, 1.6):
            shape = np.log(threshold_ratios(errors))
            moved_errors = np.exp(-2 * stretch * (shape - shape[0]))
            steps = np.append(moved_errors, 0)  # Errors that give thresholds of this shape.
            moved = threshold_table(counts, np.append(np.cumsum(steps[::-1])[::-1], 0)[:5], (target,))[0]
            assert output_error(thresholds) < output_error(moved)
