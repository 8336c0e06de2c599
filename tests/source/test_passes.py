"""Passes of windows through a layer whose experts come in groups, compared with those of all experts."""

import gc

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from mixtures import HF_CONFIG
from random_models import random_state

from checkpoints_tools.calibration import sensitivity, statistics
from checkpoints_tools.convert import measure_layers, refit
from checkpoints_tools.convert.principal_basis import second_moments
from checkpoints_tools.source import passes
from checkpoints_tools.source.layer import dense_layer, embed, read_layer
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.apply import HEAD, Dense

WINDOWS = np.random.default_rng(0).integers(0, 96, (2, 40)).astype(np.int32)


@pytest.fixture(
    scope="module",
    params=[
        "qwen3_moe",
        *(pytest.param(family, marks=pytest.mark.slow) for family in ("gpt_oss", "qwen2-moe")),
    ],
)
def source(request, tmp_path_factory):
    """A mixture without biases, one with biases and another activation, one with shared experts."""
    hf_config = HF_CONFIG if request.param == "qwen3_moe" else CASES[request.param]
    directory = tmp_path_factory.mktemp("mixture")
    return open_checkpoint(hf_directories.write(directory, hf_config, state=random_state(hf_config)))


@jax.jit
def applied(layer, x, positions):
    return layer("layer", x, positions, Dense())[0]


def in_groups(monkeypatch, experts: int, of: int):
    """Makes groups of ``experts``."""
    monkeypatch.setattr(passes, "groups_of", lambda count, size: experts)
    assert of > experts


def read(source, i=0):
    return dense_layer(source, i, *read_layer(source, i, experts=False), jnp.float32)


def test_states_are_those_of_the_whole_model(source, monkeypatch):
    in_groups(monkeypatch, 2, source.config.num_experts)
    model = load_decoder(source, jnp.float32)
    expected = embed(source, WINDOWS, np.float32)
    hidden, positions = expected.copy(), jnp.broadcast_to(jnp.arange(40), (2, 40))
    for i, whole in enumerate(model.layers):
        layer = read(source, i)
        passes.pass_windows(layer, hidden, passes.each_group(source, i, layer))
        expected = applied(whole, jnp.asarray(expected), positions)
        np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        if passes.mixture_of(layer) is not None:
            assert layer.experts_gate_up.kernel.shape[0] == 0, "the last group is freed"


@pytest.mark.parametrize("experts", [1, 3])
def test_statistics_are_those_of_all_experts(source, monkeypatch, experts):
    whole, grouped = (
        np.random.default_rng(1).standard_normal((2, 40, 64)).astype(np.float32) for _ in range(2)
    )
    expected = statistics.through_layer(load_decoder(source, jnp.float32).layers[0], whole)
    in_groups(monkeypatch, experts, source.config.num_experts)
    layer = read(source)
    seen = statistics.through_layer(layer, grouped, passes.each_group(source, 0, layer))
    for name in layer.spec.names:
        assert seen[name].counts.sum() == expected[name].counts.sum()
        assert np.abs(np.cumsum(seen[name].counts - expected[name].counts)).max() <= 3  # rounding
        np.testing.assert_allclose(seen[name].max_activation, expected[name].max_activation, rtol=1e-5)
    np.testing.assert_allclose(grouped, whole, atol=1e-5)


def test_moments_and_sensitivities_are_those_of_all_experts(source, monkeypatch):
    def measured():
        with sensitivity.ForwardStates() as states:
            moments = second_moments(source, WINDOWS, np.float32, states=states)
            return moments, sensitivity.output_sensitivities(source, np.float32, states=states)

    moments, expected = measured()
    in_groups(monkeypatch, 2, source.config.num_experts)
    moments_of_groups, sensitivities = measured()
    np.testing.assert_allclose(moments_of_groups, moments, rtol=1e-4, atol=1e-4 * np.abs(moments).max())
    for name, values in expected.items():
        tolerance = 1e-3 if name == HEAD else 2e-3
        np.testing.assert_allclose(
            sensitivities[name], values, rtol=tolerance, atol=1e-5 * values.max(), err_msg=name
        )


def test_refit_states_are_those_of_all_experts(source, monkeypatch):
    hidden = np.random.default_rng(2).standard_normal((2, 40, 64)).astype(np.float32)

    def advanced(layer, groups):
        block, _ = passes.mixture_of(layer)
        states = refit.RefitStates(hidden, hidden[:1], {}, (1.0, 8.0), source.config.layers)
        states.apply_norm(getattr(layer, block.norm.name))
        for _ in groups:
            states._exact.add_mixture(layer, block, None)
        states._exact.advance_mixture(layer, block)
        assert all(written == 0 for written in states._exact.written)
        return states._exact.stream

    expected = advanced(load_decoder(source, jnp.float32).layers[0], passes.ALL_HELD)
    in_groups(monkeypatch, 2, source.config.num_experts)
    layer = read(source)
    np.testing.assert_allclose(advanced(layer, passes.each_group(source, 0, layer)), expected, atol=1e-5)


@pytest.mark.slow
def test_one_group_is_in_memory(source, monkeypatch):
    """When a kernel is read, only the other one of its group is on the device."""
    in_groups(monkeypatch, 2, source.config.num_experts)
    shapes = {
        (2, *shape[1:]) for key, shape in source.parameters.items() if "experts_" in key and len(shape) == 3
    }
    on_device, stacked = [], passes.stacked_experts

    def reading(*arguments):
        gc.collect()
        on_device.append(sum(array.shape in shapes for array in jax.live_arrays()))
        return stacked(*arguments)

    monkeypatch.setattr(passes, "stacked_experts", reading)
    with sensitivity.ForwardStates() as states:
        second_moments(source, WINDOWS, np.float32, states=states)
        sensitivity.output_sensitivities(source, np.float32, states=states)
    with sensitivity.ForwardStates() as states:
        sensitivity.run_forward(source, WINDOWS, np.float32, states)
    layer = read(source)
    stacks = {}
    groups = measure_layers._kept_if_whole(
        passes.each_group(source, 0, layer), stacks, source.config.num_experts
    )
    statistics.through_layer(layer, embed(source, WINDOWS, np.float32), groups)
    assert not stacks
    assert len(on_device) > 20
    assert on_device == [0, 1] * (len(on_device) // 2)


def test_groups_are_as_few_as_fit(monkeypatch):
    monkeypatch.setattr(passes, "free_bytes", lambda: 1 << 30)
    of_gpt_oss = 128 * 3 * 2880 * 2880 * 2
    assert passes.groups_of(128, of_gpt_oss) == 43
    assert 43 * of_gpt_oss / 128 <= 2 << 30
    assert passes.groups_of(128, 128 * 3 * 2048 * 768 * 2) == 128  # Qwen3-30B-A3B
    assert passes.groups_of(3, 100 << 30) == 1
