"""A whole decode step on the emulator: a row has the same bits alone, in any batch, in a cache of any size,
and as a draft that is verified."""

import collections
import dataclasses

import emulated_launch
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding.engine.step import read_tokens
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from pallas_kernels.decode_attention import kernel as attention
from pallas_kernels.decode_rows import kernel as rows
from pallas_kernels.lanes import device
from pallas_kernels.matvec.mosaic_gpu import kernel as matvec

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
LENGTHS = (37, 5)
MODULES = (attention, rows, matvec)


@pytest.fixture
def emulated(monkeypatch):
    """Replaces the launches of a decode step; returns their names in order."""
    launches = []

    def lane_kernel(name, *arguments, **options):
        run = emulated_launch.lane_kernel(name, *arguments, **options)

        def recorded(*arrays):
            launches.append(name)
            return run(*arrays)

        return recorded

    builders = [f for m in MODULES for f in vars(m).values() if hasattr(f, "cache_clear")]
    monkeypatch.setattr(attention, "BLOCKS", 8)  # Fewer splits are emulated faster.
    monkeypatch.setattr(device, "unsupported_reason", lambda *oldest: None)
    for module in MODULES:
        monkeypatch.setattr(module, "lane_kernel", lane_kernel)
    for build in builders:
        build.cache_clear()
    yield launches
    for build in builders:
        build.cache_clear()


def cache_of(model, rows: list[int], capacity: int) -> KVCache:
    """Returns a cache with random positions, the same ones for a row in any batch and capacity."""
    cache = KVCache.create(model.config, len(rows), capacity, model.compute_dtype)

    def filled(layer: int, array):
        each = [
            jnp.pad(
                jax.random.normal(jax.random.key(10 * layer + row), (64, *array.shape[2:]), array.dtype),
                ((0, capacity - 64), (0, 0), (0, 0)),
            )
            for row in rows
        ]
        return jnp.stack(each)

    arrays, structure = jax.tree.flatten((cache.keys, cache.values))
    keys, values = jax.tree.unflatten(structure, [filled(i, a) for i, a in enumerate(arrays)])
    lengths = jnp.asarray([LENGTHS[row] for row in rows], jnp.int32)
    return dataclasses.replace(cache, keys=keys, values=values, lengths=lengths)


@pytest.fixture
def model(emulated):
    with pytest.MonkeyPatch.context() as patch:  # XLA makes the model.
        patch.setattr(device, "unsupported_reason", lambda *oldest: "not now")
        return random_model.graded(ModelConfig.from_hf(SHAPE))


@pytest.fixture
def thresholds(model):
    """Thresholds of two rows, at 3 and 2 bits."""
    return model_thresholds(model, jnp.array(random_model.TARGETS), jnp.array([3.0, 2.0]))


def assert_launches(launches: list[str], **others: int) -> None:
    layers = SHAPE["num_hidden_layers"]
    assert collections.Counter(launches) == others | {
        "graded_matvec_kernel": 4 * layers + 1,
        "decode_attention_kernel": layers,
        "merge_attention_kernel": layers,
        "add_norm_kernel": 2 * layers + 1,
        "swiglu_kernel": layers,
    }


def test_a_row_has_the_same_bits_in_any_batch_and_cache(emulated, model, thresholds):
    tokens = jnp.array([[7], [200]])

    def step(of_rows: list[int], capacity: int):
        emulated.clear()
        _, logits, _, stats = read_tokens(
            model,
            tokens[jnp.array(of_rows)],
            cache_of(model, of_rows, capacity),
            {name: t[jnp.array(of_rows)] for name, t in thresholds.items()},
            jnp.ones(len(of_rows), int),
        )
        assert_launches(emulated)
        return logits[0], stats.packed[0]

    expected = step([0], 128)
    for array, alone in zip(step([0, 1], 512), expected, strict=True):
        np.testing.assert_array_equal(array, alone)


def test_a_verified_token_has_the_bits_of_a_step_of_its_own(emulated, model, thresholds):
    """Three tokens of two texts are verified together, or those of the first text are read one by one."""
    tokens = jnp.array([[7, 30, 99], [200, 1, 2]])
    emulated.clear()
    cache = cache_of(model, [0, 1], 128)
    _, verified, _, stats = read_tokens(model, tokens, cache, thresholds, jnp.full(2, 3))
    assert_launches(emulated, prepare_attention_kernel=SHAPE["num_hidden_layers"])
    cache = cache_of(model, [0], 128)
    alone = {name: t[:1] for name, t in thresholds.items()}
    for i in range(3):
        _, logits, cache, of_step = read_tokens(model, tokens[:1, i : i + 1], cache, alone, jnp.ones(1, int))
        np.testing.assert_array_equal(verified[0, i], logits[0, 0])
        np.testing.assert_array_equal(stats.packed[0, i], of_step.packed[0, 0])
