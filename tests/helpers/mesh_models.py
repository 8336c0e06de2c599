"""Models on one device and on a mesh, and the comparison of their answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIGS, TARGETS, graded_model_tree, graded_tree, state_tree

from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.model.apply import Graded
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.cutting import cut_decoder
from grinqh_jax.sharding.mesh import make_mesh
from grinqh_jax.sharding.program import on_mesh

WIDE = CONFIGS["qwen3-untied"] | {
    "num_hidden_layers": 1,
    "vocab_size": 1300,
    "intermediate_size": 700,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
}
"""Several vocabulary blocks, six groups of channels in the MLP, and heads that end inside a group. On eight
devices, two share a key head."""

TOKENS = np.random.default_rng(5).integers(0, 96, (2, 24))

SLOW = pytest.mark.slow


@jax.jit
@on_mesh
def forward(model, tokens, thresholds):
    """Returns dense logits, graded logits, and the statistics of grading; dense logits alone without it."""
    decoder = model.module
    if thresholds is None:
        return decoder(tokens)
    graded = Graded(thresholds)
    logits = decoder(tokens, graded)
    return decoder(tokens), logits, graded.stats


def model_of(hf_config, *, graded=True):
    config, tree = state_tree(hf_config)
    if not graded:
        return Decoder.from_tree(config, tree, jnp.float32)
    apart = {}
    for i, spec in enumerate(config.layers):
        layer = tree["layers"][str(i)]
        if spec.experts is not None:
            names = [projection.name for projection in spec.projections if projection.of_experts]
            kept = {spec.experts.router: layer.pop(spec.experts.router)}
            apart[str(i)] = kept | {name: graded_experts(**layer.pop(name)) for name in names}
    tree = graded_model_tree(tree)
    for i, leaves in apart.items():
        tree["layers"][i] |= leaves
    return Decoder.from_tree(config, tree, jnp.float32)


def graded_experts(kernel, **bias):
    """Returns the leaves of experts; they share thresholds and level gains."""
    experts = [graded_tree({"kernel": one}) for one in kernel]
    stacked = {name: jnp.stack([expert[name] for expert in experts]) for name in ("planes", "scales")}
    return experts[0] | stacked | bias


def mesh_of(devices, config):
    mesh = make_mesh(f"tp={devices}", config)
    assert mesh is not None
    assert mesh.size == devices
    return mesh


def assert_close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def assert_same_answers(model, devices, bits=(2.5, 8.0)):
    cut = FlatModel(cut_decoder(model, mesh_of(devices, model.config)))
    thresholds = model_thresholds(model, jnp.asarray(TARGETS), jnp.asarray(bits))
    expected, actual = (forward(each, TOKENS, thresholds) for each in (FlatModel(model), cut))
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert actual[2].keys() == expected[2].keys()
    for name, stats in expected[2].items():
        # An equal mean of the levels of up to 1,400 channels: no level differs.
        np.testing.assert_allclose(actual[2][name].bits, stats.bits, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(actual[2][name].max_abs, stats.max_abs, rtol=1e-4, err_msg=name)
