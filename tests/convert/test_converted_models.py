"""Converted tiny models predict as their originals and read the bits of their targets."""

import json

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from conversions import arguments, content
from forward_passes import forward

from checkpoints_tools.convert import command as convert
from grinqh_jax import checkpoint
from grinqh_jax.decoding.statistics import weighted_mean
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model import apply
from grinqh_jax.model.decoder import linear_names
from pallas_kernels import dequantize


@pytest.fixture(scope="module")
def converted(qwen3, calib, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    assert convert.main(arguments(qwen3, out, calib)) == 0
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A sharded Llama with scaled rope, grouped queries, an untied head, and widths that need padding."""
    return tiny_models.write(tmp_path_factory.mktemp("llama") / "model", hf_directories.LLAMA3, shards=3)


def assert_same_predictions(model, original):
    tokens = np.random.default_rng(3).integers(0, 256, (2, 100))
    logits, expected = (np.asarray(forward(either, tokens)) for either in (model, original))
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 0.05
    assert np.mean(logits.argmax(-1) == expected.argmax(-1)) > 0.9


@pytest.mark.slow
def test_an_8_bit_llama_keeps_its_weights_and_its_predictions(llama, calib, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert.main(arguments(llama, out, calib, "--basis", "original", "--no-refit")) == 0
    printed = capsys.readouterr().out
    assert "bits per weight stored" in printed
    assert "not refitted" not in printed  # --no-refit is no shortage
    loaded = checkpoint.load(out, jnp.float32)
    source = open_checkpoint(llama)
    original = load_decoder(source, jnp.float32)
    columns = loaded.model.lm_head.token_to_output[...]
    for name in linear_names(loaded.config):
        weight = loaded.model.linear(name).weight
        scale = np.repeat(np.asarray(weight.scales, np.float32), 128, axis=0)
        scale = scale[: weight.in_features, : weight.out_features]
        if name == "lm_head.blocks.0":  # A small vocabulary has one block.
            kernel = source.read("lm_head.kernel")[:, np.argsort(columns)]
        else:
            kernel = source.read(f"{name}.kernel")
        error = np.abs(np.asarray(dequantize(weight)) - np.asarray(kernel, np.float32))
        # The error is at most half a step of the 8-bit code, a whole step for the group's largest weight.
        assert (error <= scale / 64 * 1.01).all(), name
        assert (error <= scale / 128 * 1.01).mean() > 0.98, name
    for key in ("norm.scale", "layers.2.post_norm.scale"):
        node = loaded.model.norm if key == "norm.scale" else loaded.model.layers[2].post_norm
        np.testing.assert_array_equal(node.scale[...], source.read(key))
    assert_same_predictions(loaded.model, original)


def test_a_llama_in_its_principal_basis_makes_the_same_predictions(llama, calib, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert.main(arguments(llama, out, calib)) == 0
    shortage = "weights were not refitted in qkv (needs 4,096 tokens), o (needs 4,096 tokens)"
    printed = capsys.readouterr().out
    assert shortage in printed
    assert "level gains were fitted, not trained: 512 calibration tokens are too few" in printed
    loaded = checkpoint.load(out, jnp.float32)
    assert loaded.quantization.provenance["basis"] == "principal"
    assert loaded.quantization.provenance["gains"] == "fitted"
    assert loaded.quantization.provenance["refit"] == []
    assert_same_predictions(loaded.model, load_decoder(open_checkpoint(llama), jnp.float32))


def test_realised_bits_match_the_targets_on_the_calibration_text(converted, qwen3):
    loaded = checkpoint.load(converted, jnp.float32)
    table = json.loads((converted / "config.json").read_text())["quantization_config"]
    assert table["targets"][0] == 1.0
    assert table["targets"][-1] == 8.0
    assert table["provenance"]["calibration"]["text"] == "calib.txt"
    names = linear_names(loaded.config)
    tokens = np.array([tiny_models.encode(tiny_models.TEXT[:128])])

    @jax.jit
    def bits_read(model, row):
        strategy = apply.Graded({name: model.linear(name).thresholds[row] for name in names})
        model(tokens, strategy)
        return {name: strategy.bits[name][:, 4:].mean() for name in names}

    for row, target in enumerate(table["targets"]):
        if target in (2.0, 3.0, 4.0, 8.0):
            bits = {name: float(mean) for name, mean in bits_read(loaded.model, row).items()}
            assert abs(weighted_mean(loaded.model, bits) - target) < 0.1, target


def test_finished_output_needs_force(qwen3, calib, converted, tmp_path, capsys):
    before = content(converted)
    assert convert.main(arguments(qwen3, converted, calib, "--max-bits", "2")) == 2
    assert "--force" in capsys.readouterr().err
    assert content(converted) == before
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("Do not delete.")
    assert convert.main(arguments(qwen3, foreign, calib, "--force")) == 2
    assert (foreign / "diary.txt").exists()
    out = tmp_path / "out"
    assert convert.main(arguments(qwen3, out, calib, "--max-bits", "2")) == 0
    assert convert.main(arguments(qwen3, out, calib, "--force")) == 0
    assert content(out) == before


def test_layers_share_their_compilations(llama, calib, tmp_path):
    """A second conversion of the same shapes compiles nothing, so a second layer does not either."""
    assert convert.main(arguments(llama, tmp_path / "a", calib)) == 0
    compiled = []

    def listen(event, duration, **metadata):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(jnp.zeros(7))
        heard = len(compiled)
        assert convert.main(arguments(llama, tmp_path / "b", calib)) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert any("backend_compile" in event for event in compiled[:heard])
    assert not [event for event in compiled[heard:] if "backend_compile" in event]
