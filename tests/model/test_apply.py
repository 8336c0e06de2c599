"""The strategy that previews bits. ``tests/decoding/test_engine.py`` compares what it counts."""

import jax
import jax.numpy as jnp

from grinqh_jax.model.apply import Previewing


def test_the_inputs_of_a_decoder_layer_are_selected_together():
    """On a GPU each selection is a launch, before the products of the next layer."""
    names = [
        "layers.0.qkv",
        "layers.0.o",
        "layers.1.qkv",
        "layers.1.o",
        "lm_head.blocks.0",
        "lm_head.blocks.1",
    ]
    thresholds = {name: jnp.array([[0.5, 1.0]]) for name in names}

    def bits(x):
        preview = Previewing(thresholds, jnp.array([[1, 2]]))
        for name in names:
            preview.observe(name, x)
        return preview.bits

    x = jax.random.normal(jax.random.key(0), (1, 4, 128))
    equations = jax.make_jaxpr(bits)(x).eqns
    assert [e.primitive.name for e in equations].count("optimization_barrier") == 3
    expected = sum(2 * (jnp.abs(x[:, 1:3]) >= threshold).mean(axis=-1) for threshold in (0.5, 1.0))
    for name in names:
        assert jnp.allclose(bits(x)[name], expected)
