"""A rotated checkpoint computes the same function, on principal axes, with a smaller graded error."""

import dataclasses

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward_passes import forward, linear_inputs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from marks import slow

from checkpoints_tools.calibration import histogram, statistics
from checkpoints_tools.calibration.allocation import GradedCosts, threshold_tables
from checkpoints_tools.convert.principal_basis import (
    RotatedCheckpoint,
    channel_scales,
    principal_axes,
    second_moments,
)
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.apply import Graded
from grinqh_jax.model.linear import GradedLinear
from pallas_kernels import Activations, codes, quantize

WINDOWS = np.random.default_rng(4).integers(0, 300, (4, 48)).astype(np.int32)


def float32_state(hf_config, low_rank=False):
    """Returns random float32 weights; with ``low_rank`` the embedding has few directions."""
    state = {name: value.astype(np.float32) for name, value in hf_directories.random_state(hf_config).items()}
    if low_rank:
        shape = state["model.embed_tokens.weight"].shape
        generator = np.random.default_rng(8)
        sizes = 0.7 ** np.arange(shape[1])
        turn = np.linalg.qr(generator.standard_normal((shape[1], shape[1])))[0]
        embedding = 8 * generator.standard_normal(shape) * sizes @ turn
        state["model.embed_tokens.weight"] = embedding.astype(np.float32)
    return state


@pytest.fixture(scope="module", params=["qwen3-tied", pytest.param("llama-untied", marks=pytest.mark.slow)])
def source(request, tmp_path_factory):
    hf_config = hf_directories.QWEN3 if request.param == "qwen3-tied" else hf_directories.LLAMA3
    directory = tmp_path_factory.mktemp(request.param)
    hf_directories.write(directory, hf_config, state=float32_state(hf_config))
    return open_checkpoint(directory)


@pytest.fixture(scope="module")
def rotated(source):
    return RotatedCheckpoint(source, principal_axes(second_moments(source, WINDOWS, np.float32)))


@pytest.mark.parametrize("source", ["qwen3-tied", "llama-untied"], indirect=True)
def test_rotation_keeps_the_function(source, rotated):
    before = np.asarray(forward(load_decoder(source, jnp.float32), WINDOWS))
    after = np.asarray(forward(load_decoder(rotated, jnp.float32), WINDOWS))
    assert np.abs(after - before).max() / np.abs(before).max() < 1e-4


def test_input_channels_have_equal_size_and_the_axes_are_principal(source, rotated):
    model = load_decoder(rotated, jnp.float32)
    total = 0.0
    for name, x in linear_inputs(model, WINDOWS).items():
        reader = name.removesuffix(".blocks.0").rpartition(".")[2]
        if reader not in ("qkv", "gate_up", "lm_head"):
            continue
        kernel = np.asarray(model.linear(name).kernel[...], np.float64)
        sizes = np.linalg.norm(kernel, axis=1)
        np.testing.assert_allclose(sizes, sizes.mean(), rtol=0.01)  # Channel scales are bfloat16.
        prefix = name.removesuffix(".blocks.0").removesuffix(reader)
        norm = {"qkv": "input_norm", "gate_up": "post_norm", "lm_head": "norm"}[reader]
        stream = np.asarray(x, np.float64)[:, statistics.SKIPPED_POSITIONS :] / rotated.read(
            f"{prefix}{norm}.scale"
        )
        total = total + np.einsum("btc,btd->cd", stream, stream)
    energy = np.diag(total)
    assert (np.diff(energy) < 1e-3 * energy[0]).all()
    assert np.abs(total - np.diag(energy)).max() < 1e-3 * energy[0]


def test_ranges_of_the_head_add_up_to_the_head(rotated):
    whole = rotated.read("lm_head.kernel")
    fresh = dataclasses.replace(rotated)  # A copy with nothing cached.
    ranges = [fresh.read("lm_head.kernel", slice(start, start + 100)) for start in (0, 100, 200)]
    np.testing.assert_allclose(np.concatenate(ranges, axis=1), whole, atol=1e-6)
    tokens = np.array([3, 4, 5, 9, 250, 251])
    np.testing.assert_allclose(fresh.read("lm_head.kernel", tokens), whole[:, tokens], atol=1e-6)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=40))
@examples(50, in_ci=1000)
def test_channel_scales_are_positive_bounded_and_stored_exactly(squares):
    scales = channel_scales(np.array(squares))
    assert scales.dtype == np.float32
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    assert scales.max() / scales.min() <= 64.0**2 * 1.02
    np.testing.assert_array_equal(scales, np.asarray(jnp.asarray(scales, jnp.bfloat16), np.float32))


@jax.jit
def graded_product(linear, x, thresholds):
    return Graded({"": thresholds})("", linear, Activations.of(x)).array


def graded_error(checkpoint, bits):
    """Returns the relative squared error of layer 0 at a mean of ``bits``, calibrated on its own inputs."""
    model = load_decoder(checkpoint, jnp.float32)
    inputs = linear_inputs(model, WINDOWS)
    error = energy = 0.0
    for name in ("layers.0.qkv", "layers.0.gate_up"):
        x, dense = inputs[name], model.linear(name)
        w = dense.kernel[...]
        weight = quantize(w)
        costs = GradedCosts(np.asarray(histogram.count(x)), np.asarray(codes.level_errors(w, weight)), w.size)
        table = threshold_tables({name: costs}, (bits, 8.0))[name]
        linear = GradedLinear(
            weight.planes,
            weight.scales,
            table,
            jnp.ones(4),
            jnp.max(x),
            in_features=w.shape[0],
            out_features=w.shape[1],
        )
        y = graded_product(linear, x, jnp.asarray(table[0]))
        exact = np.asarray(dense.dense(x))
        error += np.sum(np.square(np.asarray(y) - exact))
        energy += np.sum(np.square(exact))
    return error / energy


@pytest.mark.parametrize("bits", [1.5, *slow(2.0, 3.0)])
def test_a_stream_with_few_directions_is_read_with_less_error(tmp_path, bits):
    directory = hf_directories.write(tmp_path / "m", state=float32_state(hf_directories.QWEN3, low_rank=True))
    source = open_checkpoint(directory)
    rotated = RotatedCheckpoint(source, principal_axes(second_moments(source, WINDOWS, np.float32)))
    assert graded_error(rotated, bits) < 0.6 * graded_error(source, bits)
