"""The rule for large batches, and decode steps that read all channels at one level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from marks import slow
from random_models import TARGETS, TOKENS, graded_model

from grinqh_jax.decoding import engine, policy, reading
from grinqh_jax.decoding.dial import Dial, DialState, layer_shares
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.thresholds import stacked_tables
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.model.experts import GradedExperts
from pallas_kernels import Activations, quantize


@given(
    rows=st.integers(1, 256),
    bits=st.lists(st.floats(1, 8), max_size=20),
    num_planes=st.integers(1, 4),
)
@examples(50, in_ci=1000)
def test_no_row_gets_fewer_bits_than_it_asks_for(rows, bits, num_planes):
    bits = [min(wanted, 2 * num_planes) for wanted in bits]
    level = reading.batch_level(rows, bits, num_planes)
    assert level in reading.possible_levels(rows, num_planes)
    if rows <= 16:
        assert level is None
        return
    assert all(2 * level >= wanted for wanted in bits)
    if max(bits, default=0) <= 4:  # no more than needed
        assert level == min(3, num_planes)
    else:
        assert level == num_planes


def chunk(model, thresholds, level=None):
    """Decodes 6 tokens of two rows after a prompt of 12."""
    cache = KVCache.create(model.config, 2, 40, jnp.float32)
    logits, cache = engine.prefill(model, TOKENS[:, :12], jnp.array([12, 12]), cache)
    return engine.decode_chunk(
        model,
        jnp.argmax(logits, axis=-1).astype(jnp.int32),
        jnp.zeros(2, bool),
        cache,
        thresholds,
        Sampling.create(2),
        jnp.array([-1]),
        jnp.array([6, 4]),
        steps=6,
        policy=policy.CPU,
        level=level,
    )[0]


@pytest.mark.parametrize("name", ["qwen3-tied-gqa", *slow("llama-tied-mha")])
@pytest.mark.parametrize("level", [3, *slow(1, 4)])
def test_a_step_at_a_level_equals_grading_that_reads_all_channels_at_it(name, level):
    model = graded_model(name)
    threshold = jnp.where(jnp.arange(4) < level, 0, jnp.inf)
    expected = chunk(model, dict.fromkeys(linear_names(model.config), threshold))
    ours = chunk(model, dict.fromkeys(linear_names(model.config), jnp.zeros(4)), level)
    np.testing.assert_array_equal(ours.tokens[0], expected.tokens[0])
    np.testing.assert_array_equal(ours.tokens[1, :4], expected.tokens[1, :4])
    np.testing.assert_array_equal(ours.grading_stats.bits[:, 0], 2 * level)
    np.testing.assert_allclose(
        ours.grading_stats.max_abs[:, 0], expected.grading_stats.max_abs[:, 0], rtol=1e-3
    )


@pytest.mark.slow
def test_the_dial_stays_as_it_is():
    model = graded_model("qwen3-tied-gqa")
    names, state = tuple(linear_names(model.config)), DialState.create(jnp.array([2.0, 3.0]))
    shares = jnp.asarray(layer_shares(model.config), jnp.float32)
    dial = Dial(stacked_tables(model), jnp.asarray(TARGETS, jnp.float32), shares, state, names)
    at_level = chunk(model, dial, level=3)
    jax.tree.map(np.testing.assert_array_equal, at_level.dial, state)
    graded = chunk(model, dial)
    assert not np.array_equal(jax.tree.leaves(graded.dial)[-1], jax.tree.leaves(state)[-1])


@pytest.mark.parametrize("level", [1, 3, 4])
def test_experts_at_a_level_equal_grading_that_reads_all_channels_at_it(level):
    rng = np.random.default_rng(0)
    weights = [quantize(jnp.asarray(rng.standard_normal((70, 90)), jnp.float32)) for _ in range(3)]
    planes, scales = (jnp.stack([getattr(w, name) for w in weights]) for name in ("planes", "scales"))
    gains = jnp.array([1.25, 1.125, 1.0625, 1.0])
    bias = jnp.asarray(rng.standard_normal((3, 90)), jnp.float32)
    table = jnp.zeros((2, 4))
    experts = GradedExperts(planes, scales, table, gains, jnp.ones(()), bias, in_features=70, out_features=90)
    chosen = experts.choose(jnp.array([[2, 0], [1, 2]]), jnp.array([[1.0, 0.5], [0.25, 2.0]]))
    x = jnp.asarray(rng.standard_normal((2, 2, 70)), jnp.float32)
    thresholds = jnp.broadcast_to(jnp.where(jnp.arange(4) < level, 0, jnp.inf), (2, 2, 4))
    expected = chosen.graded(Activations.of(x), thresholds)[0].array
    np.testing.assert_allclose(chosen.at_level(x, level), expected, rtol=1e-4, atol=1e-4)
    without = chosen._replace(bias=None).at_level(x, level)
    added = jnp.array([[bias[2], bias[0] / 2], [bias[1] / 4, bias[2] * 2]])
    np.testing.assert_allclose(expected - without, added, rtol=1e-4, atol=1e-4)
