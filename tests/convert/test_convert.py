"""Conversions of tiny models: their stages, interruptions, refused input."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hf_directories
import numpy as np
import pytest
import tiny_models
from conversions import arguments, content
from marks import slow

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
from grinqh_jax.hf import HFCheckpoint, open_checkpoint
from grinqh_jax.model.decoder import linear_names

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("gains", ["fitted", *slow("none")])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "refit",
    [
        (),
        ("qkv", "o", "gate_up"),
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


def test_a_disk_without_space_for_hidden_states_is_refused_before_a_weight_is_read(
    qwen3, calib, tmp_path, capsys, monkeypatch
):
    disk = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)

    def read_tensor(*arguments):
        raise AssertionError("a tensor is read")

    monkeypatch.setattr(HFCheckpoint, "read_tensor", read_tensor)
    assert convert.main(arguments(qwen3, tmp_path / "out", calib)) == 2
    message = capsys.readouterr().err
    assert "out.partial: hidden states need" in message
    assert message.count("\n") == 1


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
