"""The decoder against transformers, live if torch is installed and recorded otherwise."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from marks import slow
from random_models import CONFIGS, TOKENS, graded_model, state_tree

from grinqh_jax.hf.reader import open_checkpoint
from grinqh_jax.model import apply, decoder
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.linear import GradedLinear
from pallas_kernels import Activations

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOLERANCE = 1e-4
"""Maximum difference of float32 logits, relative to the largest logit."""

run = jax.jit(lambda model, tokens: model(tokens))


@jax.jit
def run_graded(model, tokens, thresholds):
    """Returns logits, and the grading statistics of each linear layer."""
    strategy = apply.Graded(thresholds)
    return model(tokens, strategy), strategy.stats


def relative_difference(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_recorded_logits(name):
    model = Decoder.from_tree(*state_tree(CONFIGS[name]), jnp.float32)
    recorded = np.load(FIXTURES / "random_logits.npz")[name]
    assert relative_difference(run(model, TOKENS)[0, ::8], recorded) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name):
    pytest.importorskip("torch")
    from record_logits import logits, torch_model

    theirs = logits(torch_model(CONFIGS[name], seed=3), TOKENS)
    model = Decoder.from_tree(*state_tree(CONFIGS[name], seed=3), jnp.float32)
    assert relative_difference(run(model, TOKENS), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama3-scaled-rope-gqa", "qwen3-tied-gqa"])
def test_bfloat16_differs_by_rounding_only(name):
    config, tree = state_tree(CONFIGS[name])
    exact = np.asarray(run(Decoder.from_tree(config, tree, jnp.float32), TOKENS))
    rounded = run(Decoder.from_tree(config, tree, jnp.bfloat16), TOKENS)
    assert rounded.dtype == jnp.float32
    # bfloat16 rounds by 2**-9. About ten roundings in a row add up.
    assert np.sqrt(np.mean((rounded - exact) ** 2)) / np.std(exact) < 2**-9 * 10


@pytest.mark.parametrize("name", ["qwen3-tied-gqa", *slow("llama3-scaled-rope-gqa")])
def test_zero_thresholds_equal_full_precision(name):
    model = graded_model(name)
    names = decoder.linear_names(model.config)
    assert all(isinstance(model.linear(n), GradedLinear) for n in names)
    graded, stats = run_graded(model, TOKENS, {n: jnp.zeros(4) for n in names})
    assert relative_difference(graded, np.asarray(run(model, TOKENS))) < 1e-5
    assert stats.keys() == set(names)
    assert all(s.bits.shape == TOKENS.shape and np.all(s.bits == 8) for s in stats.values())


def test_every_row_of_a_batch_has_its_own_thresholds():
    model = graded_model("qwen3-tied-gqa")
    names = decoder.linear_names(model.config)
    high, low = jnp.zeros(4), jnp.array([0.3, 0.8, 2.0, 4.0])
    together, stats = run_graded(model, TOKENS, dict.fromkeys(names, jnp.stack([high, low])))
    for row, thresholds in enumerate((high, low)):
        alone, stats_alone = run_graded(model, TOKENS[row : row + 1], dict.fromkeys(names, thresholds[None]))
        assert relative_difference(together[row : row + 1], np.asarray(alone)) < 1e-4
        for n in names:
            np.testing.assert_allclose(stats[n].bits[row], stats_alone[n].bits[0], atol=0.2)
            np.testing.assert_allclose(stats[n].max_abs[row], stats_alone[n].max_abs[0], rtol=1e-3)


def test_statistics_are_bits_and_largest_activation_of_every_position():
    model = graded_model("qwen3-tied-gqa")
    x = jnp.array([[[0.5, -3.0] + [0.0] * 62, [1.0] * 64]])
    thresholds = jnp.array([0.1, 0.4, 1.5, 2.0])
    strategy = apply.Graded({"layers.0.qkv": thresholds})
    strategy("layers.0.qkv", model.linear("layers.0.qkv"), Activations.of(x))
    stats = strategy.stats["layers.0.qkv"]
    np.testing.assert_allclose(stats.max_abs, [[3.0, 1.0]])
    np.testing.assert_allclose(stats.bits, [[(4 + 8) / 64, 4.0]])
    np.testing.assert_array_equal(strategy.bits["layers.0.qkv"], stats.bits)


def test_abstract_tree_describes_the_leaves_of_a_model():
    model = graded_model("llama3-tied-wide-head")
    leaves = {name: (leaf.shape, leaf.dtype) for name, leaf in decoder.checkpoint_leaves(model).items()}
    expected = {
        ".".join(key.key for key in path): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree.leaves_with_path(decoder.abstract_tree(model.config, 8, 3))
    }
    assert leaves.keys() == expected.keys()
    linears = {k: v for k, v in expected.items() if not k.endswith(("scale", "embedding"))}
    assert {k: leaves[k] for k in linears} == linears


def test_a_trained_model_equals_recorded_logits(shared):
    recorded = np.load(FIXTURES / "qwen3_32m_logits.npz")
    checkpoint = open_checkpoint(shared / "models" / "qwen3-32m")
    tree = unflatten_dict({key: checkpoint.read(key) for key in checkpoint.parameters}, sep=".")
    model = Decoder.from_tree(checkpoint.config, tree, jnp.float32)
    logits = run(model, recorded["tokens"])[0, :, ::16]
    assert relative_difference(logits, recorded["logits"]) <= TOLERANCE
