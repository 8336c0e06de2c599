"""gpt-oss in MXFP4, converted with all stages: its decode steps against transformers, and against float64."""

import copy

import hf_directories
import jax
import jax.numpy as jnp
import mxfp4_models
import numpy as np
import pytest
from family_cases import TOKENS
from flax.traverse_util import unflatten_dict
from options_off import with_one_option_off

from checkpoints_tools.calibration.text import Calibration
from checkpoints_tools.convert.driver import convert
from checkpoints_tools.convert.options import BASES, ORIGINAL, PRINCIPAL, Options
from checkpoints_tools.convert.plan import make_plan
from grinqh_jax import checkpoint
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import layer_shares
from grinqh_jax.decoding.thresholds import StackedThresholds, model_thresholds
from grinqh_jax.hf import open_checkpoint
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, checkpoint_leaves

pytest.importorskip("torch")

pytestmark = pytest.mark.slow

PROMPT = 12
"""Number of tokens that a prefill reads at full precision; the windows have 8."""

GRADED = (3.0, 4.0)
"""Mean bits of the two texts."""

TOLERANCE = 1e-4
"""Maximum difference of float32 logits, relative to the root mean square of all."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The converted model in each basis."""
    directory = tmp_path_factory.mktemp("gpt_oss")
    packed, _ = mxfp4_models.packed_state()
    source = open_checkpoint(hf_directories.write(directory / "model", mxfp4_models.QUANTIZED, packed))
    windows = np.random.default_rng(23).integers(0, source.config.vocab_size, (64, 64)).astype(np.int32)
    calibration = Calibration(windows=windows, other=windows, name="random")
    plans = {basis: make_plan(source, calibration, Options(basis=basis)) for basis in BASES}
    return {
        basis: checkpoint.load(convert(plan, directory / basis), jnp.float32) for basis, plan in plans.items()
    }


@pytest.fixture(scope="module")
def original():
    """The original model in transformers; its weights were computed without the package's reader."""
    from record_logits import torch_model

    return torch_model(mxfp4_models.CONFIG, state=mxfp4_models.packed_state()[1])


@jax.jit
def decode(model: Decoder, thresholds: StackedThresholds):
    """Returns logits from position ``PROMPT - 1`` on, and the bits of each linear layer at each step."""
    cache = KVCache.create(model.config, *TOKENS.shape, jnp.float32)
    prompt, cache = engine.prefill(model, TOKENS[:, :PROMPT], jnp.array([PROMPT] * 2), cache)

    def step(cache, token):
        logits, cache, stats = engine.decode_step(model, token, cache, thresholds)
        return cache, (logits, stats.bits)

    _, (logits, bits) = jax.lax.scan(step, cache, TOKENS[:, PROMPT:].T)
    return jnp.concatenate([prompt[None], logits]).swapaxes(0, 1), bits


def thresholds_of(loaded: checkpoint.Loaded, *bits: float) -> StackedThresholds:
    return model_thresholds(
        loaded.model, jnp.asarray(loaded.quantization.targets), jnp.asarray(bits, jnp.float32)
    )


def without_each_option(loaded: checkpoint.Loaded):
    """Yields an option's name and the converted model without it."""
    tree = unflatten_dict(checkpoint_leaves(loaded.model), sep=".")
    for option, config, changed in with_one_option_off(loaded.config, tree):
        yield option, Decoder.from_tree(config, changed, jnp.float32)


def differences(ours, theirs) -> np.ndarray:
    """Returns the root mean square of the difference of each position, relative to that of all logits."""
    ours = np.asarray(ours, np.float64)
    return np.sqrt(np.mean((ours - theirs) ** 2, axis=-1) / np.mean(theirs**2))


def test_decode_steps_at_full_bits_are_those_of_transformers(converted, original):
    """The median, because 8 bits may decide differently between two experts with almost the same score."""
    from record_logits import logits

    loaded, expected = converted[PRINCIPAL], logits(original, TOKENS)[:, PROMPT - 1 :]
    full = thresholds_of(loaded, 8, 8)
    assert np.median(differences(decode(loaded.model, full)[0], expected)) < 0.025
    for option, model in without_each_option(loaded):
        assert np.median(differences(decode(model, full)[0], expected)) > 0.05, option


def test_fewer_bits_differ_more_from_transformers(converted, original):
    from record_logits import logits

    loaded, expected = converted[PRINCIPAL], logits(original, TOKENS)[:, PROMPT - 1 :]
    medians = []
    for target in (8, 4, 3, 2):
        ours, bits = decode(loaded.model, thresholds_of(loaded, target, target))
        medians.append(np.median(differences(ours, expected)))
        assert np.asarray(bits).mean(axis=(0, 1)) @ layer_shares(loaded.config) == pytest.approx(
            target, abs=0.1
        )
    assert medians == sorted(medians)
    assert medians[1] < 0.06
    assert medians[2] < 0.12


def test_graded_decode_steps_equal_the_oracle(converted, original):
    """Biases, sinks, norms and router are the source's, so the conversion must have kept them."""
    from graded_torch import make_graded
    from record_logits import logits

    loaded = converted[ORIGINAL]
    thresholds = thresholds_of(loaded, *GRADED)
    expected = np.empty((2, TOKENS.shape[1] - PROMPT + 1, loaded.config.vocab_size))
    for text, tokens in enumerate(TOKENS):
        oracle = copy.deepcopy(original).double()
        of_tokens = {
            name: np.where(np.arange(len(tokens))[:, None] < PROMPT, 0, table[text])
            for name, table in thresholds.items()
        }
        make_graded(oracle, loaded.model, of_tokens)
        expected[text] = logits(oracle, tokens[None])[0, PROMPT - 1 :]
    assert differences(decode(loaded.model, thresholds)[0], expected).max() < TOLERANCE
    for option, model in without_each_option(loaded):
        assert np.median(differences(decode(model, thresholds)[0], expected)) > 100 * TOLERANCE, option
