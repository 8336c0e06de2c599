"""Other ways to read a GRINQH checkpoint: their levels, means and weights."""

import jax
import numpy as np
import pytest

from checkpoints_tools.baselines import reading
from checkpoints_tools.calibration import histogram
from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.model.apply import Graded, in_head
from grinqh_jax.model.decoder import linear_shapes
from pallas_kernels import grading

pytestmark = pytest.mark.usefixtures("optimized_programs")

CALIBRATION = (
    "It was late when the two brothers came back to the house by the river, and nobody was awake. " * 40
)
TEXT = "The rain had not stopped since morning, so the old man kept to his chair and read the paper. " * 12


@pytest.fixture(scope="module")
def bundled():
    return Generator.load(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def windows(bundled):
    tokens = bundled.tokenizer.encode(CALIBRATION)
    return np.array(tokens[:512], np.int32).reshape(2, 256)


@jax.jit
def observe_levels(model, tokens, thresholds):
    strategy, seen = Graded(thresholds), {}

    def apply(name, linear, x):
        seen[name] = grading.levels(x.array, thresholds[name])
        return strategy(name, linear, x)

    model(tokens, apply)
    return seen


def levels(bundled, generator, bits):
    thresholds = {name: rows[0] for name, rows in generator.dial(bits).thresholds.items()}
    # All ways of reading share the weights, so one program serves them.
    return observe_levels(bundled.model, np.array([bundled.tokenizer.encode(TEXT)[:64]]), thresholds)


@pytest.mark.slow
def test_truncation_reads_every_channel_at_one_level(bundled):
    truncated = reading.truncation(bundled)
    for bits in (2, 4, 6, 8):
        assert {
            tuple(np.unique(read_levels)) for read_levels in levels(bundled, truncated, bits).values()
        } == {(bits // 2,)}
    tokens = np.array(bundled.tokenizer.encode(TEXT)[:128])
    results = measure(truncated.model, truncated.targets, tokens, [2.0, 4.0, 8.0, "full"], sequence_length=64)
    assert [result.realised_bits for result in results] == [2, 4, 8, 8]
    assert results[0].kl > 5 * results[1].kl > 50 * results[2].kl
    assert results[2].kl == pytest.approx(results[3].kl, abs=1e-4)


@pytest.mark.slow
def test_skip_int4_uses_two_levels_and_keeps_the_mean(bundled, windows):
    skipping = reading.skip_int4(bundled, windows)
    for name, read_levels in levels(bundled, skipping, 2.0).items():
        assert set(np.unique(read_levels)) == {0, 2}, name
        if not in_head(name):
            assert np.mean(read_levels == 2) == pytest.approx(0.5, abs=0.1), name
    assert {tuple(np.unique(read_levels)) for read_levels in levels(bundled, skipping, 4.0).values()} == {
        (2,)
    }
    tokens = np.array(bundled.tokenizer.encode(TEXT)[:256])
    own = measure(bundled.model, bundled.targets, tokens, [2.0], sequence_length=64)[0]
    two, three, four = measure(skipping.model, skipping.targets, tokens, [2.0, 3.0, 4.0], sequence_length=64)
    assert two.realised_bits == pytest.approx(2, abs=0.1)
    assert three.realised_bits == pytest.approx(3, abs=0.1)
    assert four.realised_bits == 4
    assert two.kl > three.kl > four.kl
    assert own.kl < two.kl, "grading gains nothing over skipping"
    # Rereading leaves the checkpoint unchanged.
    again = measure(bundled.model, bundled.targets, tokens, [2.0], sequence_length=64)[0]
    assert again == own


@pytest.mark.slow
def test_the_whole_head_is_read_and_the_layers_keep_their_mean(bundled):
    whole = reading.whole_head(bundled)
    config = bundled.model.config
    asked = {bits: reading.with_whole_head(bits, config, 8) for bits in (2.0, 3.0)}
    read_levels = levels(bundled, whole, asked[2.0])
    for name, own in levels(bundled, bundled, 2.0).items():
        if in_head(name):
            assert set(np.unique(read_levels[name])) == {4}, name
        else:
            np.testing.assert_allclose(read_levels[name].mean(), own.mean(), atol=0.02)
    tokens = np.array(bundled.tokenizer.encode(TEXT * 2)[:384])
    own = measure(bundled.model, bundled.targets, tokens, [2.0, 3.0], sequence_length=64)
    read = measure(whole.model, whole.targets, tokens, list(asked.values()), sequence_length=64)
    head = config.hidden_size * config.vocab_size
    shapes = linear_shapes(config)
    share = head / sum(k * n for k, n in shapes.values())
    for bits, graded, result in zip(asked, own, read, strict=True):
        assert result.realised_bits_without_head == pytest.approx(bits, abs=0.1)
        expected = (1 - share) * result.realised_bits_without_head + share * 8
        assert result.realised_bits == pytest.approx(expected, abs=1e-3)
        assert result.kl < 0.95 * graded.kl


def test_counts_cover_the_inputs_of_every_layer(bundled, windows):
    counts = reading.activation_counts(bundled.model, windows)
    sizes = {"layers.0.qkv": 256, "layers.5.down": 768, "lm_head.blocks.1": 256}
    for name, width in sizes.items():
        assert counts[name].sum() == width * 2 * (256 - 4)  # Without the first positions of a window.


def test_skip_thresholds_are_quantiles():
    values = np.abs(np.random.default_rng(0).standard_normal(200_000)).astype(np.float32)
    cuts = reading.skip_thresholds(np.asarray(histogram.count(values)), (1.0, 2.0, 3.0, 4.0))
    np.testing.assert_allclose(cuts, [*np.quantile(values, [0.75, 0.5, 0.25]), 0], rtol=0.01)


def test_dense_checkpoints_cannot_be_reread(shared):
    dense = Generator.load(shared / "models" / "qwen3-7m")
    with pytest.raises(UsageError, match="is not a GRINQH checkpoint"):
        reading.truncation(dense)
    with pytest.raises(UsageError, match="is not a GRINQH checkpoint"):
        reading.whole_head(dense)
