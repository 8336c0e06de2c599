"""The pass that collects activation statistics: the statistics, and the hidden states it leaves."""

import hf_directories
import jax.numpy as jnp
import numpy as np
import pytest
from forward_passes import linear_inputs

from checkpoints_tools.calibration import histogram, statistics
from grinqh_jax.hf import load_decoder, open_checkpoint

TOKENS = np.random.default_rng(2).integers(0, 300, (3, 20))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    directory = hf_directories.write(tmp_path_factory.mktemp("model"))
    return load_decoder(open_checkpoint(directory), jnp.float32)


def test_layers_one_by_one_see_the_inputs_of_the_whole_model(decoder):
    inputs = linear_inputs(decoder, TOKENS)
    hidden = np.asarray(decoder.embed(jnp.asarray(TOKENS), jnp.float32)).copy()
    for i, layer in enumerate(decoder.layers):
        seen = statistics.through_layer(layer, hidden)
        for projection in layer.spec.names:
            check(seen[projection], inputs[f"layers.{i}.{projection}"])
    check(statistics.of_head(decoder.norm, hidden), inputs["lm_head.blocks.0"])
    np.testing.assert_allclose(decoder.norm(hidden), inputs["lm_head.blocks.0"], rtol=1e-4, atol=1e-5)


def check(seen, inputs):
    """Compares counts over all scored positions, and the maximum over all positions."""
    scored = jnp.asarray(inputs[:, statistics.SKIPPED_POSITIONS :])
    assert seen.finite
    assert seen.counts.sum() == scored.size
    expected = np.asarray(histogram.count(scored))
    # Running windows one at a time rounds differently, which moves a few values to the next bin.
    assert np.abs(np.cumsum(seen.counts - expected)).max() <= max(3, scored.size // 1000)
    np.testing.assert_allclose(seen.max_activation, np.abs(inputs).max(), rtol=1e-5)


def test_the_first_positions_count_for_the_range_only():
    x = np.full((1, 10, 8), 0.5, np.float32)
    x[0, 0, 0] = 1000.0
    seen = statistics.LinearStatistics.empty()
    seen.add(statistics.observe(jnp.asarray(x)))
    assert seen.max_activation == 1000
    assert seen.counts.sum() == 6 * 8
    assert np.count_nonzero(seen.counts) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_inputs_are_noticed(value):
    x = np.ones((1, 10, 8), np.float32)
    x[0, 7, 3] = value
    seen = statistics.LinearStatistics.empty()
    seen.add(statistics.observe(jnp.asarray(x)))
    assert not seen.finite
