"""Converts tiny models end to end."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from forward_passes import forward

from checkpoints_tools.calibration.text import read_calibration
from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert import (
    driver,
    measure_layers,
    quantize_linear,
    refit_layers,
    refit_tokens,
    train_gains,
)
from checkpoints_tools.convert.options import Options
from checkpoints_tools.convert.plan import make_plan
from grinqh_jax import checkpoint
from grinqh_jax.decoding.statistics import weighted_mean
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model import apply
from grinqh_jax.model.decoder import linear_names
from pallas_kernels import dequantize

ROOT = Path(__file__).parents[2]


def arguments(model: Path, out: Path, calib: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--out", str(out), "--calib", str(calib), *more]


def content(out: Path) -> dict[str, bytes]:
    """Returns the metadata and the leaves of a checkpoint, without the random file names of Orbax."""
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    leaves = json.loads((out / "manifest.json").read_text())["leaves"]
    return {name: (out / name).read_bytes() for name in files} | {"leaves": leaves}


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    return tiny_models.text_file(tmp_path_factory.mktemp("calib") / "calib.txt")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_models.write(tmp_path_factory.mktemp("qwen3") / "model")


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


@pytest.mark.slow
def test_a_projection_with_more_inputs_than_tokens_keeps_its_weights_and_is_named(
    calib, tmp_path, monkeypatch, capsys
):
    """The 2 windows have 256 tokens, 4 of each window unscored; ``down`` has 250 inputs."""
    monkeypatch.setattr(refit_tokens, "LEAST_TOKENS", 256)
    wide = hf_directories.QWEN3 | {"intermediate_size": 250, "num_hidden_layers": 1}
    model = tiny_models.write(tmp_path / "model", wide)
    names, leaves = {"qkv", "o", "gate_up", "lm_head"}, {}
    for flag, refitted in (("--refit", ["qkv", "o", "gate_up", "lm_head"]), ("--no-refit", [])):
        out = tmp_path / flag
        # Uses fitted gains, because trained gains depend on all weights.
        assert convert.main(arguments(model, out, calib, flag, "--gains", "fitted")) == 0
        printed = capsys.readouterr().out
        shortage = "not refitted in down (needs 256 tokens): the calibration text provides 248"
        assert (shortage in printed) == (flag == "--refit")
        provenance = json.loads((out / "config.json").read_text())["quantization_config"]["provenance"]
        assert provenance["refit"] == refitted
        leaves[flag] = content(out)["leaves"]
    changed = {leaf for leaf, entry in leaves["--refit"].items() if entry != leaves["--no-refit"][leaf]}
    assert {name for name in (*names, "down") if any(name in leaf.split(".") for leaf in changed)} == names


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


@pytest.mark.parametrize("gains", ["fitted", "none"])
def test_jsonl_calibration_and_fewer_planes(qwen3, tmp_path, gains):
    records = tmp_path / "calib.jsonl"
    records.write_text("\n".join([json.dumps({"question": "1 + 2?", "answer": "3\n#### 3"})] * 60))
    flags = ["--max-bits", "4", "--tokens", "400", "--gains", gains]
    assert convert.main(arguments(qwen3, tmp_path / "out", records, *flags)) == 0
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.quantization.max_bits == 4
    assert loaded.quantization.provenance["calibration"]["windows"] == 2
    assert loaded.model.full_bits == 4
    for name in linear_names(loaded.config):
        fitted = gains == "fitted" and (name.endswith(".qkv") or name.startswith("lm_head"))
        assert (loaded.model.linear(name).level_gains[0] != 1) == fitted, name


@pytest.mark.slow  # 35 s: three interpreters
def test_a_killed_conversion_resumes_and_ends_the_same(qwen3, tmp_path, capsys):
    calib = tmp_path / "long.txt"  # Long enough to refit weights and train gains.
    calib.write_text(tiny_models.TEXT * 13)
    uninterrupted, out = tmp_path / "uninterrupted", tmp_path / "out"
    assert convert.main(arguments(qwen3, uninterrupted, calib)) == 0
    assert "not refitted" not in capsys.readouterr().out
    partial = tmp_path / "out.partial"
    command = [sys.executable, "-m", "checkpoints_tools.convert", *arguments(qwen3, out, calib)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

    def written() -> int:
        return len(list(partial.glob("*partial_save/*/_CHECKPOINT_METADATA")))

    kills = 0
    for wanted in (1, 3, 5):  # Embedding; first refitted layer; everything but the trained gains.
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and written() < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not out.exists()
    assert kills == 3
    with pytest.raises(checkpoint.reader.CheckpointError, match="unfinished"):
        checkpoint.load(out)
    assert written() == 5
    assert convert.main(arguments(qwen3, out, calib)) == 0
    assert content(out) == content(uninterrupted)
    assert not partial.exists()
    loaded = checkpoint.load(out)
    assert loaded.quantization.provenance["gains"] == "trained"
    for name in linear_names(loaded.config):
        gains = loaded.model.linear(name).level_gains[...]
        trained = train_gains.trained_levels(len(gains))
        assert (gains[:trained] != 1).all(), name
        assert gains[-1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["principal", "original"])
@pytest.mark.parametrize("refit", [True, False])
def test_progress_is_reported_as_often_as_planned(qwen3, calib, tmp_path, monkeypatch, basis, refit):
    monkeypatch.setattr(train_gains, "STEPS", 2)
    monkeypatch.setattr(train_gains, "LEAST_TOKENS", 256)
    monkeypatch.setattr(refit_tokens, "LEAST_TOKENS", 256)
    source = open_checkpoint(qwen3)
    plan = make_plan(source, read_calibration(source, [calib], 512), Options(basis=basis, refit=refit))
    assert bool(plan.refit) == refit
    notes = []
    assert driver.convert(plan, tmp_path / "out", on_progress=notes.append) == tmp_path / "out"
    assert len(notes) == plan.steps
    assert sum(map(plan.work_of, notes)) == plan.work
    assert [note.split()[0] for note in notes] == [
        stage.name for stage in plan.stages for _ in range(stage.steps)
    ]
    assert notes[-2:] == ["gains 0", "gains 1"]
    assert checkpoint.load(tmp_path / "out").quantization.provenance["gains"] == "trained"


@pytest.mark.parametrize(
    "refit",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("qkv", "o", "gate_up"), marks=pytest.mark.slow),
        ("qkv", "o", "gate_up", "down", "lm_head"),
    ],
)
def test_each_weight_is_packed_once_even_with_interruptions(qwen3, calib, tmp_path, monkeypatch, refit):
    source = open_checkpoint(qwen3)
    options = Options(refit=bool(refit), gains="fitted")
    plan = dataclasses.replace(
        make_plan(source, read_calibration(source, [calib], 512), options), refit=refit
    )
    uninterrupted = content(driver.convert(plan, tmp_path / "uninterrupted"))
    packed, interruptions = [], ["measure layers.0", "measure layers.1", "refit layers.0"]

    def quantize(rounding, read_outputs, *refit):
        packed.append(rounding.name)
        return quantize_linear.quantize_linear(rounding, read_outputs, *refit)

    def interrupt(note):
        if note in interruptions:
            interruptions.remove(note)
            raise KeyboardInterrupt

    for stage in (measure_layers, refit_layers):
        monkeypatch.setattr(stage, "quantize_linear", quantize)
    for _ in range(3 if refit else 2):
        with pytest.raises(KeyboardInterrupt):
            driver.convert(plan, tmp_path / "out", on_progress=interrupt)
    driver.convert(plan, tmp_path / "out", on_progress=interrupt)
    assert sorted(packed) == sorted(linear_names(source.config))
    assert content(tmp_path / "out") == uninterrupted


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


def test_damaged_sources_are_refused_before_anything_is_written(qwen3, calib, tmp_path, capsys):
    broken = tmp_path / "broken"
    tiny_models.write(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (broken / "generation_config.json").write_text("{")
    assert convert.main(arguments(broken, tmp_path / "out", calib)) == 2
    message = capsys.readouterr().err
    assert "model.safetensors is truncated or corrupt" in message
    assert "generation_config.json is not valid JSON" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("mlp.up_proj", "layers.1.gate_up: 1 of"),
        ("input_layernorm", "layers.1.qkv: its inputs are not finite"),
    ],
)
def test_nonfinite_weights_are_named(calib, tmp_path, capsys, tensor, named):
    state = hf_directories.random_state(hf_directories.QWEN3)
    state[f"model.layers.1.{tensor}.weight"].reshape(-1)[3] = np.nan
    model = tiny_models.write(tmp_path / "model", state=state)
    assert convert.main(arguments(model, tmp_path / "out", calib)) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", "0"), "--tokens 0: must be positive"),
        (("--model", "./nowhere"), "not a directory"),
        (("--calib", "/nowhere.txt"), "No such file"),
    ],
)
def test_wrong_arguments(qwen3, calib, tmp_path, capsys, more, message):
    assert convert.main(arguments(qwen3, tmp_path / "out", calib, *more)) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_with_tokens_that_the_model_lacks(calib, tmp_path, capsys):
    model = tiny_models.write(tmp_path / "model", hf_directories.QWEN3 | {"vocab_size": 100})
    assert convert.main(arguments(model, tmp_path / "out", calib)) == 2
    assert "the model has a vocabulary of 100" in capsys.readouterr().err


def test_a_source_without_a_tokenizer(qwen3, calib, tmp_path, capsys):
    model = hf_directories.write(tmp_path / "model")
    assert convert.main(arguments(model, tmp_path / "out", calib)) == 2
    assert "has no tokenizer" in capsys.readouterr().err


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
