"""The description of a layer against the parameters and the data flow of a model."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIGS, state_tree

from grinqh_jax.model.apply import Dense
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_shapes
from grinqh_jax.model.decoder_layer import DecoderLayer
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.parameters import parameter_shapes, stream_readers, stream_writers

QWEN3 = ModelConfig.from_hf(CONFIGS["qwen3-tied-gqa"])
LLAMA = ModelConfig.from_hf(CONFIGS["llama3-tied-wide-head"])


def test_readers_and_writers_of_the_residual_stream():
    readers = stream_readers(LLAMA)
    assert len(readers) == 2 * LLAMA.num_layers + 1
    assert readers["layers.1.qkv"] == "layers.1.input_norm"
    assert readers["layers.1.gate_up"] == "layers.1.post_norm"
    assert readers[HEAD] == "norm"
    assert stream_writers(LLAMA)[:2] == ["layers.0.o", "layers.0.down"]
    layer = LLAMA.layers[0]
    assert layer.writers == ("o", "down")
    assert [layer.block_after(block) for block in layer.blocks] == [layer.blocks[1], None]
    assert [layer.block_of(name).writes.name for name in layer.names] == ["o", "o", "down", "down"]
    with pytest.raises(KeyError, match="router: a layer has the projections qkv, o, gate_up, down"):
        layer.block_of("router")


def test_head_norms_are_an_option():
    assert [norm.name for norm in LLAMA.layers[0].norms] == ["input_norm", "post_norm"]
    assert [norm.name for norm in QWEN3.layers[0].norms[2:]] == ["q_norm", "k_norm"]


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_kernels_are_made_of_their_arrays(config):
    shapes = parameter_shapes(config)
    for name, (in_features, out_features) in linear_shapes(config).items():
        if not name.startswith(HEAD):
            arrays = shapes[f"{name}.kernel"]
            assert {inputs for _, inputs in arrays} == {in_features}
            assert sum(outputs for outputs, _ in arrays) == out_features
    assert shapes["layers.1.qkv.kernel"][0] == (config.num_heads * config.head_dim, config.hidden_size)


def test_a_layer_adds_only_what_its_writers_write():
    class Silenced(Dense):
        """An apply strategy that replaces the outputs of one projection by zeros."""

        def __init__(self, name):
            self.silenced = f"layer.{name}"

        def product(self, name, linear, x):
            y = super().product(name, linear, x)
            return jnp.zeros_like(y) if name == self.silenced else y

    config, tree = state_tree(CONFIGS["qwen3-tied-gqa"])
    layer = DecoderLayer(config, config.layers[0], tree["layers"]["0"], jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, config.hidden_size)), jnp.float32)
    positions = jnp.arange(5)[None]

    def run(silenced):
        return np.asarray(layer("layer", x, positions, Silenced(silenced))[0])

    attention, mlp = layer.spec.blocks
    np.testing.assert_array_equal(run(attention.reads.name), run(attention.writes.name))
    np.testing.assert_array_equal(run(mlp.reads.name), run(mlp.writes.name))
    assert not np.array_equal(run(attention.writes.name), run(mlp.writes.name))
