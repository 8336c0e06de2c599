"""Sensitivities: the layer-by-layer pass compared with whole-model gradients and with divergences."""

import shutil

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward_passes import forward

from checkpoints_tools.calibration import sensitivity
from checkpoints_tools.calibration.statistics import SKIPPED_POSITIONS
from checkpoints_tools.source import head as source_head
from grinqh_jax.errors import CheckpointError
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.apply import HEAD, Dense
from grinqh_jax.model.decoder import linear_shapes

WINDOWS = np.random.default_rng(6).integers(0, 300, (3, 40)).astype(np.int32)


@pytest.fixture(scope="module", params=["qwen3-tied", pytest.param("llama-untied", marks=pytest.mark.slow)])
def source(request, tmp_path_factory):
    hf_config = hf_directories.QWEN3 if request.param == "qwen3-tied" else hf_directories.LLAMA3
    return open_checkpoint(hf_directories.write(tmp_path_factory.mktemp(request.param), hf_config))


class Perturbed(Dense):
    """Adds a given array to the outputs of each linear layer."""

    def __init__(self, added):
        self.added = added

    def product(self, name, linear, x):
        return super().product(name, linear, x) + self.added[name]


def zeros(config, tokens):
    """Outputs of each linear layer that add nothing."""
    return {name: np.zeros((*tokens.shape, n), np.float32) for name, (_, n) in linear_shapes(config).items()}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@jax.jit
def perturbed_logits(model, tokens, added):
    return model(tokens, Perturbed(added))


@pytest.fixture
def greedy_tokens(monkeypatch):
    """Removes the noise, so that the sampled token is the most likely one."""

    def no_noise(*args, **kwargs):
        return jnp.zeros(args[1])

    monkeypatch.setattr(jax.random, "gumbel", no_noise)
    sensitivity._sample.clear_cache()
    yield
    sensitivity._sample.clear_cache()


def measured(source, windows, **options):
    with sensitivity.ForwardStates() as states:
        sensitivity.run_forward(source, windows, np.float32, states)
        return sensitivity.output_sensitivities(source, np.float32, states=states, **options)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_size_of_the_states_is_known_before(source, dtype, monkeypatch):
    monkeypatch.setattr(sensitivity, "TOKENS", 2 * 40)
    with sensitivity.ForwardStates() as states:
        sensitivity.run_forward(source, WINDOWS, dtype, states)
        assert states._file.tell() == sensitivity.states_bytes(source.config, WINDOWS, dtype) > 0


def test_a_disk_without_space_for_the_states_is_refused(tmp_path, monkeypatch):
    disk = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with sensitivity.ForwardStates(tmp_path, 2_000_000):
        pass
    with pytest.raises(CheckpointError) as refused:
        sensitivity.ForwardStates(tmp_path, 2_400_000_000)
    assert str(refused.value) == (
        f"{tmp_path}: hidden states need 2,400.0 MB of disk space for a while, and 2.0 MB are free; free some"
        " space, or put --out on another disk"
    )
    assert not list(tmp_path.iterdir())


def test_sensitivities_are_mean_squares_of_the_whole_models_gradients(source, greedy_tokens):
    model = load_decoder(source, jnp.float32)
    tokens = jnp.asarray(WINDOWS)
    log_p = log_softmax(forward(model, tokens))
    predicted = log_p.argmax(-1)

    def log_likelihood(added):
        log_p = jax.nn.log_softmax(model(tokens, Perturbed(added)))
        return jnp.sum(jnp.take_along_axis(log_p, predicted[..., None], axis=-1))

    added = zeros(source.config, tokens)
    gradients = jax.jit(jax.grad(log_likelihood))(added)
    sensitivities = measured(source, WINDOWS)
    # For the output projection it is the expectation over all tokens.
    p = np.exp(log_p)[:, SKIPPED_POSITIONS:]
    np.testing.assert_allclose(sensitivities.pop(HEAD), np.mean(p * (1 - p), axis=(0, 1)), rtol=1e-3)
    del gradients[f"{HEAD}.blocks.0"]
    assert sensitivities.keys() == gradients.keys()
    for name, gradient in gradients.items():
        expected = np.mean(np.asarray(gradient, np.float64)[:, SKIPPED_POSITIONS:] ** 2, axis=(0, 1))
        np.testing.assert_allclose(
            sensitivities[name], expected, rtol=2e-3, atol=1e-4 * expected.max(), err_msg=name
        )


def test_axes_rotate_the_outputs_that_write_the_stream(source):
    width = source.config.hidden_size
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0].astype(np.float32)
    plain = measured(source, WINDOWS)
    rotated = measured(source, WINDOWS, axes=axes)
    for name in plain:
        if name.endswith((".o", ".down")):
            assert not np.allclose(rotated[name], plain[name], rtol=0.01)
            np.testing.assert_allclose(rotated[name].sum(), plain[name].sum(), rtol=1e-3)
        else:
            np.testing.assert_array_equal(rotated[name], plain[name])


def test_sensitivities_predict_the_divergence_that_noise_causes(source):
    """KL is about ``sum_n E[g_n**2] E[d_n**2] / 2``. Sampling one token per position makes it noisy."""
    windows = np.random.default_rng(7).integers(0, 300, (40, 40)).astype(np.int32)
    sensitivities = measured(source, windows)
    sensitivities[f"{HEAD}.blocks.0"] = sensitivities[HEAD]
    model = load_decoder(source, jnp.float32)
    nothing = zeros(source.config, windows)
    reference = log_softmax(perturbed_logits(model, windows, nothing))
    for seed, name in enumerate(("layers.0.qkv", "layers.1.gate_up", "layers.1.down", f"{HEAD}.blocks.0")):
        noise = np.random.default_rng(seed).standard_normal(nothing[name].shape, np.float32)
        noise *= np.sqrt(0.004 / sensitivities[name].sum())
        log_q = log_softmax(perturbed_logits(model, windows, nothing | {name: noise}))
        divergence = np.sum(np.exp(reference) * (reference - log_q), axis=-1)[:, SKIPPED_POSITIONS:].mean()
        assert 0.6 * 0.002 < divergence < 1.6 * 0.002, name


def test_the_head_uses_more_windows_than_the_layers(source, monkeypatch):
    monkeypatch.setattr(sensitivity, "TOKENS", 40)
    one, three = (measured(source, WINDOWS[:n]) for n in (1, 3))
    p = np.exp(log_softmax(forward(load_decoder(source, jnp.float32), WINDOWS)))
    expected = np.mean((p * (1 - p))[:, SKIPPED_POSITIONS:], axis=(0, 1))
    np.testing.assert_allclose(three[HEAD], expected, rtol=1e-3)
    assert not np.allclose(one.pop(HEAD), three.pop(HEAD), rtol=0.01)
    for name in one:
        np.testing.assert_allclose(three[name], one[name], rtol=1e-5, err_msg=name)


def test_ranges_of_the_vocabulary_change_nothing(source, greedy_tokens, monkeypatch):
    whole = measured(source, WINDOWS)
    monkeypatch.setattr(source_head, "VALUES_IN_MEMORY", 120 * 100)
    assert len(list(source_head.vocabulary(source, 40))) > 1
    in_ranges = measured(source, WINDOWS)
    for name in whole:
        np.testing.assert_allclose(
            in_ranges[name], whole[name], rtol=1e-3, atol=1e-5 * whole[name].max(), err_msg=name
        )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_states_are_taken_in_reverse_order_and_leave_no_file(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "TOKENS", 2 * 5)
    layers = np.random.default_rng(0).standard_normal((4, 3, 5, 7)).astype(dtype)
    with sensitivity.ForwardStates(tmp_path) as states:
        for hidden in layers[:3]:
            states.add_layer(hidden)
        np.testing.assert_array_equal(states.take_layer(), layers[2, :2])
        states.add_layer(layers[3])
        for i in (3, 1, 0):
            np.testing.assert_array_equal(states.take_layer(), layers[i, :2])
        assert not list(tmp_path.iterdir())
