"""The pass that collects activation statistics: what it sees, and what it leaves behind."""

import hf_directories
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools.calibration import histogram, statistics
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.apply import Dense
from grinqh_jax.model.decoder import LAYER_LINEARS

TOKENS = np.random.default_rng(2).integers(0, 300, (3, 20))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    directory = hf_directories.write(tmp_path_factory.mktemp("model"))
    return load_decoder(open_checkpoint(directory), jnp.float32)


class Recorder(Dense):
    """Keeps every layer's inputs."""

    def __init__(self):
        self.inputs = {}

    def product(self, name, linear, x):
        self.inputs[name] = np.asarray(x)
        return super().product(name, linear, x)


def test_layer_by_layer_sees_what_the_whole_model_sees(decoder):
    recorder = Recorder()
    final, _ = decoder.hidden(jnp.asarray(TOKENS), jnp.broadcast_to(jnp.arange(20), (3, 20)), recorder)
    decoder.logits(final, recorder)
    hidden = np.asarray(decoder.embed(jnp.asarray(TOKENS), jnp.float32)).copy()
    for i, layer in enumerate(decoder.layers):
        seen = statistics.through_layer(layer, hidden)
        for part in LAYER_LINEARS:
            check(seen[part], recorder.inputs[f"layers.{i}.{part}"])
    check(statistics.of_head(decoder.norm, hidden), recorder.inputs["lm_head.blocks.0"])
    np.testing.assert_allclose(decoder.norm(hidden), final.array, rtol=1e-4, atol=1e-5)


def check(seen, inputs):
    """All channels of all windows but the first positions; the maximum of everything."""
    counted = jnp.asarray(inputs[:, statistics.SKIPPED_POSITIONS :])
    assert seen.finite
    assert seen.counts.sum() == counted.size
    expected = np.asarray(histogram.count(counted))
    # Windows one at a time round differently: a few values change their bin for the next one.
    assert np.abs(np.cumsum(seen.counts - expected)).max() <= max(3, counted.size // 1000)
    np.testing.assert_allclose(seen.max_activation, np.abs(inputs).max(), rtol=1e-5)


def test_the_first_positions_set_the_range_and_nothing_else():
    x = np.full((1, 10, 8), 0.5, np.float32)
    x[0, 0, 0] = 1000.0
    seen = statistics.LinearStatistics.empty()
    seen.add(statistics.observe(jnp.asarray(x)))
    assert seen.max_activation == 1000
    assert seen.counts.sum() == 6 * 8
    assert np.count_nonzero(seen.counts) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_noticed(value):
    x = np.ones((1, 10, 8), np.float32)
    x[0, 7, 3] = value
    seen = statistics.LinearStatistics.empty()
    seen.add(statistics.observe(jnp.asarray(x)))
    assert not seen.finite
