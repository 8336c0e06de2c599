"""The vocabulary in blocks: every token once, those that matter first, and each logit where it belongs."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
def test_few_tokens_first(size, expected):
    assert block_sizes(size) == expected


@given(st.integers(1, 300_000))
@settings(deadline=None, max_examples=200)
def test_blocks_make_up_the_vocabulary_in_whole_tiles(size):
    sizes = block_sizes(size)
    assert sum(sizes) == size
    assert min(sizes) > 0
    assert all(block % 512 == 0 for block in sizes[:-1])


def test_every_token_has_a_place_and_those_that_matter_are_first():
    sensitivities = np.random.default_rng(0).exponential(size=5000) ** 4
    blocks = vocabulary.token_blocks(sensitivities)
    assert tuple(map(len, blocks)) == block_sizes(5000)
    for before, after in itertools.pairwise(blocks):
        assert sensitivities[before].min() >= sensitivities[after].max()
    columns = vocabulary.token_columns(blocks)
    np.testing.assert_array_equal(np.concatenate(blocks)[columns], np.arange(5000))


def test_tokens_that_the_text_never_comes_near_count_for_something():
    found = vocabulary.smooth_sensitivities(np.array([1.0, 0, 0, 0]))
    assert found.sum() == pytest.approx(1)
    assert found[1] == pytest.approx(vocabulary.UNSEEN / 4)


def test_logits_are_in_the_order_of_the_tokens():
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((16, 5000)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((2, 3, 16)), jnp.float32)
    tokens = vocabulary.token_blocks(rng.random(5000))
    tree = {
        "columns": jnp.asarray(vocabulary.token_columns(tokens)),
        "blocks": {str(i): {"kernel": kernel[:, block]} for i, block in enumerate(tokens)},
    }
    called = []

    def apply(name, linear, x):
        called.append(name)
        return Dense()(name, linear, x)

    logits = OutputProjection(tree, (16, 5000), jnp.float32)(Activations.of(x), apply)
    assert called == list(block_shapes(16, 5000))
    np.testing.assert_allclose(logits, np.asarray(x) @ kernel, rtol=1e-4, atol=1e-5)
