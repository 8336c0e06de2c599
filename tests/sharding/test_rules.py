"""The rules cut every axis into parts that hold each element, in an order that the devices share."""

import family_cases
import jax
import numpy as np
import pytest
from random_models import CONFIGS

from grinqh_jax.errors import UsageError
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import Projection
from grinqh_jax.model.partition import AXIS
from grinqh_jax.sharding import rules
from pallas_kernels.lanes import device
from pallas_kernels.layout import GROUP
from pallas_kernels.selection import PADDING

BASE = CONFIGS["qwen3-untied"]


def config_of(**fields):
    return ModelConfig.from_hf(BASE | fields)


def elements(indices):
    return np.sort(indices[indices != PADDING])


@pytest.mark.parametrize(("size", "devices"), [(18944, 8), (700, 4), (112, 2), (768, 8), (1024, 2)])
def test_an_mlp_is_cut_in_whole_groups_of_nearly_equal_number(size, devices):
    indices = rules.CUTS["intermediate"](config_of(intermediate_size=size), devices)
    np.testing.assert_array_equal(elements(indices), np.arange(size))
    for row in indices:
        real = row[row != PADDING]
        assert (row[: len(real)] == real).all(), "padding comes last"
        if len(real):
            assert real[0] % GROUP == 0
    groups = [-(-np.sum(row != PADDING) // GROUP) for row in indices]
    assert max(groups) - min(groups) <= 1


@pytest.mark.parametrize(("heads", "kv_heads", "devices"), [(8, 4, 2), (8, 4, 8), (8, 1, 4), (16, 2, 8)])
def test_query_heads_meet_their_key_heads(heads, kv_heads, devices):
    config = config_of(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=32)
    queries, keys = (rules.CUTS[axis](config, devices) // 32 for axis in ("query", "key_value"))
    np.testing.assert_array_equal(np.unique(queries), np.arange(heads))
    for own, shared in zip(queries[:, ::32], keys[:, ::32], strict=True):
        assert len(own) % len(shared) == 0
        # Consecutive queries share a key head, as in the whole model.
        np.testing.assert_array_equal(np.repeat(shared, len(own) // len(shared)), own * kv_heads // heads)


def test_outputs_that_a_projection_has_side_by_side_are_cut_each():
    config = config_of(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    qkv = Projection("qkv", "hidden", ("query", "key_value", "key_value"))
    indices = rules.output_indices(config, qkv, 2)
    expected = [*range(32, 64), *range(64 + 16, 64 + 32), *range(96 + 16, 96 + 32)]
    np.testing.assert_array_equal(indices[1], expected)
    assert rules.output_indices(config, Projection("o", "query", ("hidden",)), 2) is None


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_input_channels_keep_their_places_in_groups(devices):
    config = config_of(num_attention_heads=8, num_key_value_heads=8, head_dim=40)
    indices = rules.input_indices(config, "query", devices)
    np.testing.assert_array_equal(elements(indices), np.arange(320))
    device, place = np.nonzero(indices != PADDING)
    np.testing.assert_array_equal(place % GROUP, indices[device, place] % GROUP)
    group = indices[device, place] // GROUP
    for i in range(devices):
        for g in np.unique(place[device == i] // GROUP):
            assert len(np.unique(group[(device == i) & (place // GROUP == g)])) == 1


def test_a_vocabulary_is_cut_evenly_with_padding_at_its_end():
    indices = rules.vocabulary_indices(21, 4)
    assert indices.shape == (4, 6)
    np.testing.assert_array_equal(elements(indices), np.arange(21))
    assert (indices[-1, 3:] == PADDING).all()


def test_an_axis_without_a_rule_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(rules.CUTS, "intermediate")
    problems = rules.obstacles(config_of(), 2)
    assert problems[0] == "layers.0.gate_up: no rule cuts its axis intermediate; run this model on one device"


def test_an_exchange_that_the_devices_lack_is_refused():
    mesh = jax.sharding.AbstractMesh((2,), (AXIS,), (jax.sharding.AxisType.Auto,))
    with pytest.raises(UsageError, match=r'the exchange "kernel" needs .*; choose "auto" or "sum"'):
        rules.partition(config_of(), mesh, "kernel")
    assert rules.partition(config_of(), mesh).exchange == "sum"


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2")
def test_gpus_exchange_by_the_kernel_by_default():
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((2,), (AXIS,), (jax.sharding.AxisType.Auto,), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        assert rules.partition(config_of(), mesh).exchange == "kernel"
        assert rules.partition(config_of(), mesh, "sum").exchange == "sum"


@pytest.mark.parametrize("devices", [2, 4])
def test_value_heads_of_gated_delta_nets_meet_their_key_heads(devices):
    config = ModelConfig.from_hf(family_cases.CASES["qwen3_5"] | {"linear_num_value_heads": 8})
    heads = config.delta_heads
    indices = rules.CUTS["delta_qkv"](config, devices)
    keys = heads.key_heads * heads.key_dim
    queries, own_keys, values = np.split(
        indices, [16 * max(2 // devices, 1), 32 * max(2 // devices, 1)], axis=1
    )
    np.testing.assert_array_equal(own_keys, queries + keys)
    np.testing.assert_array_equal(elements(values), np.arange(2 * keys, heads.channels))
    for own, value in zip(queries // heads.key_dim, (values - 2 * keys) // heads.value_dim, strict=True):
        # Consecutive value heads share a key head, as in the whole model.
        np.testing.assert_array_equal(np.unique(value * heads.key_heads // heads.value_heads), np.unique(own))
