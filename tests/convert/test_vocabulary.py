"""Vocabulary blocks: every token once, sensitive tokens first, logits in the order of the tokens."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from checkpoints_tools.convert import vocabulary
from grinqh_jax.model.apply import Dense
from grinqh_jax.model.output_projection import OutputProjection, block_shapes, block_sizes
from pallas_kernels import Activations


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (300, (300,)),
        (4096, (512, 512, 3072)),
        (16384, (1024, 3072, 12288)),
        (151936, (9728, 28672, 113536)),
    ],
)
def test_the_first_blocks_are_small(size, expected):
    assert block_sizes(size) == expected


@given(st.integers(1, 300_000))
@examples(50, in_ci=1000)
def test_blocks_cover_the_vocabulary_in_whole_tiles(size):
    sizes = block_sizes(size)
    assert sum(sizes) == size
    assert min(sizes) > 0
    assert all(block % 512 == 0 for block in sizes[:-1])


def test_every_token_has_one_output_and_sensitive_tokens_come_first():
    sensitivities = np.random.default_rng(0).exponential(size=5000) ** 4
    blocks = vocabulary.token_blocks(sensitivities)
    assert tuple(map(len, blocks)) == block_sizes(5000)
    for before, after in itertools.pairwise(blocks):
        assert sensitivities[before].min() >= sensitivities[after].max()
    token_to_output = vocabulary.token_to_output(blocks)
    np.testing.assert_array_equal(np.concatenate(blocks)[token_to_output], np.arange(5000))


def test_unseen_tokens_keep_some_sensitivity():
    smooth = vocabulary.smooth_sensitivities(np.array([1.0, 0, 0, 0]))
    assert smooth.sum() == pytest.approx(1)
    assert smooth[1] == pytest.approx(vocabulary.UNSEEN / 4)


def test_logits_come_in_the_order_of_the_tokens():
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((16, 5000)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((2, 3, 16)), jnp.float32)
    tokens = vocabulary.token_blocks(rng.random(5000))
    tree = {
        "columns": jnp.asarray(vocabulary.token_to_output(tokens)),
        "blocks": {str(i): {"kernel": kernel[:, block]} for i, block in enumerate(tokens)},
    }
    called = []

    def apply(name, linear, x):
        called.append(name)
        return Dense()(name, linear, x)

    logits = OutputProjection(tree, (16, 5000), jnp.float32)(Activations.of(x), apply)
    assert called == list(block_shapes(16, 5000))
    np.testing.assert_allclose(logits, np.asarray(x) @ kernel, rtol=1e-4, atol=1e-5)
