"""Scripts in ``benchmarks`` start: on a CPU where they can; others lower their first programs for CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import AxisType

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.hf import load_decoder, open_checkpoint
from pallas_kernels.lanes import device

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_decode(tmp_path):
    output = tmp_path / "decode.json"
    options = (
        "--platform cpu --layers 1 --bits 3 --contexts 64 --tokens 4 --repeats 1 --prefill 64 --batch 1 17"
    )
    shape = ["--shapes", BUNDLED_MODEL]
    command = [sys.executable, SCRIPTS / "decode.py", *shape, *options.split(), "--output", output]
    subprocess.run(command, check=True, timeout=200)
    report = json.loads(output.read_text())
    (results,) = report["shapes"].values()
    rows = results["decode"]
    cases = [(row["bits"], row["batch"], row["level"]) for row in rows]
    assert cases == [(3.0, 1, None), (3.0, 17, 3), ("bf16", 1, None), ("bf16", 17, None)]
    assert all(row["tokens_per_second"] > 0 and row["times_bf16"] > 0 for row in rows)
    assert [row["prompt"] for row in results["prefill"]] == [64, 64]
    assert report["skipped"] == report["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "results"),
    [
        ("prefill_kernels", f"--shapes {BUNDLED_MODEL} --tokens 64 --layers 1", "prefills"),
        ("prompt_attention", f"--shape {BUNDLED_MODEL} --chunks 32x64@48 64x64", "rows"),
    ],
)
def test_prefill_scripts_start_without_a_gpu(tmp_path, script, options, results):
    """A CPU has no device times: bf16 and graded, or two chunks by XLA."""
    output = tmp_path / "report.json"
    command = [sys.executable, SCRIPTS / f"{script}.py", *options.split(), "--output", output]
    subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, timeout=100)
    report = json.loads(output.read_text())
    assert [row["us"] for row in report[results]] == [0, 0]
    assert report["skipped"] == report["problems"] == []


@pytest.mark.slow
def test_prefill_alone(tmp_path):
    output = tmp_path / "decode.json"
    options = "--platform cpu --layers 1 --contexts --repeats 1 --prefill 32 64"
    command = [sys.executable, SCRIPTS / "decode.py", "--shapes", BUNDLED_MODEL, *options.split()]
    subprocess.run([*command, "--output", output], check=True, timeout=100)
    (results,) = json.loads(output.read_text())["shapes"].values()
    assert results["decode"] == []
    assert [row["prompt"] for row in results["prefill"]] == [32, 64, 32, 64]


@pytest.mark.slow
def test_decode_stops_at_its_limit(tmp_path):
    output = tmp_path / "decode.json"
    command = [
        sys.executable,
        SCRIPTS / "decode.py",
        "--platform",
        "cpu",
        "--seconds",
        "0",
        "--output",
        output,
    ]
    subprocess.run(command, check=True, timeout=100)
    report = json.loads(output.read_text())
    assert report["shapes"] == {"Qwen3-8B": {"decode": [], "prefill": []}}
    assert report["skipped"] == ["Qwen3-8B, graded, mesh none", "Qwen3-8B, bf16, mesh none"]


@pytest.mark.slow
def test_speculation(tmp_path):
    output = tmp_path / "speculation.json"
    options = "--layers 1 --contexts 32 --steps 2 --batch 4 --bits 3 --repeats 1 --profile 2"
    command = [sys.executable, SCRIPTS / "speculation.py", "--shapes", BUNDLED_MODEL, *options.split()]
    subprocess.run([*command, "--output", output], check=True, timeout=250)
    report = json.loads(output.read_text())
    cases = [(row["drafter"], row["drafts"], row["verified"]) for row in report["steps"]]
    lookup = [("lookup", drafts, verified) for drafts, verified in ((0, 0), (3, 3), (3, 0), (1, 1), (1, 0))]
    assert cases == [("off", 0, 0), *lookup, ("self", 3, 3)]
    assert {row["drafts"] for row in report["speed"]} == {0, 1, 3}
    profiled = ["off, 0 drafts", "lookup, 0 drafts"]
    assert report["profiles"] == {f"context 32, 4 texts, {of}": None for of in profiled}
    assert report["skipped"] == report["problems"] == []


@pytest.mark.slow
def test_draft_model(tmp_path):
    dense, text, out = (
        tiny_models.write(tmp_path / "dense", hf_directories.QWEN3),
        tmp_path / "text.txt",
        tmp_path / "out",
    )
    text.write_text(tiny_models.TEXT * 10)
    options = ["--layers", "1", "--steps", "40", "--text", text]
    command = [sys.executable, SCRIPTS / "draft_model.py", "--model", dense, "--out", out, *options]
    subprocess.run(command, check=True, timeout=200)
    figures = json.loads((out / "training.json").read_text())
    assert figures["steps"] == 40
    assert figures["after"] < 0.9 * figures["before"]
    draft = load_decoder(open_checkpoint(out), jnp.float32)
    assert len(draft.layers) == 1
    embeddings = (open_checkpoint(each).read("embed.embedding") for each in (dense, out))
    np.testing.assert_array_equal(*embeddings)


@pytest.mark.slow
def test_streaming(tmp_path):
    output = tmp_path / "streaming.json"
    command = [sys.executable, SCRIPTS / "streaming.py", "--shape", BUNDLED_MODEL, "--tokens", "16"]
    subprocess.run([*command, "--chunks", "4", "--output", output], check=True, timeout=100)
    (row,) = json.loads(output.read_text())["rows"]
    assert row["after_the_first_chunk"] > 0


SMALL_MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 8192,
    "num_hidden_layers": 8,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""Configuration of a model with eight layers."""


@pytest.mark.slow
def test_serving_rounds(tmp_path):
    output = tmp_path / "rounds.json"
    options = "--layers 1 --prompt-tokens 80 --slots 2 --answers 1 --prompts 2 --trace"
    command = [sys.executable, SCRIPTS / "serving_rounds.py", "--shape", BUNDLED_MODEL, *options.split()]
    subprocess.run([*command, "--output", output], check=True, timeout=300)
    report = json.loads(output.read_text())
    assert [run["prompts"] for run in report["runs"]] == ["launched one by one", "command buffers"]
    for run in report["runs"]:
        (figures,) = run["answers"]
        calls = {
            kind: {step: row["calls"] for step, row in rows.items()}
            for kind, rows in figures["rounds"].items()
        }
        assert calls["without a prompt"]["dispatch of generate"] == 1
        assert "dispatch of prefill" not in calls["without a prompt"]
        assert {
            calls["with a prompt"][f"dispatch of {name}"] for name in ("prefill", "insert", "generate")
        } == {1}
        assert figures["gaps_ms"]["first token after chunk"]["count"] == 2
        assert run["prompts_alone"]["buckets"] == [80]
        assert run["trace"]


@pytest.mark.slow
def test_conversion(tmp_path):
    """A run with all stages, after one that stopped and kept its steps."""
    config, output = tmp_path / "config.json", tmp_path / "conversion.json"
    config.write_text(json.dumps(SMALL_MIXTURE))
    command = [sys.executable, SCRIPTS / "conversion.py", "--config", config, "--output", output]
    command += ["--layers", "3", "--tokens", "8192", "--warm", "--work", tmp_path / "work"]
    subprocess.run([*command, "--seconds", "0"], check=True, timeout=100)
    (stopped,) = json.loads(output.read_text())["runs"]
    assert list(stopped["steps"]) == ["forward layers.0"]
    subprocess.run(command, check=True, timeout=300)
    report = json.loads(output.read_text())
    run = report["runs"][-1]
    first = ["forward", "backward", "embedding", "measurements", "head's measurements", "refit"]
    assert list(run["stages"]) == [*first, "head's refit", "gains", "finalize"]
    assert report["layers_of_shape"] == 8
    assert run["of_all_layers"] > run["seconds"]
    assert run["steps"]["finalize"]["peak_host_bytes"] == run["peak_host_bytes"] > 1e8


@pytest.mark.slow
def test_conversion_of_level_gains_alone(tmp_path):
    config, output = tmp_path / "config.json", tmp_path / "conversion.json"
    config.write_text(json.dumps(SMALL_MIXTURE))
    command = [sys.executable, SCRIPTS / "conversion.py", "--config", config, "--output", output]
    command += ["--layers", "3", "--tokens", "4096", "--warm", "--only-gains", "--work", tmp_path / "work"]
    subprocess.run(command, check=True, timeout=300)
    (run,) = json.loads(output.read_text())["runs"]
    assert list(run["stages"]) == ["random codes", "gains", "finalize"]
    gains = run["stages"]["gains"]
    assert gains["each_step"] > 0
    assert run["of_all_layers"] > gains["seconds"] + 24 * gains["each_step"]


@pytest.mark.slow
def test_two_gpus(tmp_path):
    """Two devices of a CPU take the part of the GPUs."""
    output = tmp_path / "two_gpus.jsonl"
    options = "--exchanges sum --layers 1 --batch 1 --bits 3 --tokens 4 --repeats 1"
    command = [sys.executable, SCRIPTS / "two_gpus.py", "--part", f"shape:{BUNDLED_MODEL}", *options.split()]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([*command, "--output", output], env=os.environ | flags, check=True, timeout=200)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["devices"] for line in lines if "exchange" in line] == [2, 1]
    assert lines[-1]["times_one_gpu"]["sum"] > 0


class Lowered(Exception):
    """Ends a script after its first programs are lowered."""


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
@pytest.mark.parametrize(
    ("script", "options", "count"),
    [
        ("level_matmul", "--checks", 24),
        ("level_matmul", "--times --rows 16 --levels 3 4", 2),
        ("router", "--rows 1 4 --shapes 2048x128x8 2048x60x4", 4),
        ("sampling", "--rows 2", 18),
        ("graded_windows", "--rows 16", 2),
        ("attention", "--batch 2 --variants default same-share large --layers 1 --capacity 128", 3),
    ],
)
def test_programs_lower_for_cuda(monkeypatch, script, options, count):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    module = __import__(script)
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=h200)
    texts = []

    def lower(functions, arguments, *_, **__):
        for key, function in functions.items():
            with jax.sharding.use_abstract_mesh(mesh):
                traced = jax.jit(function).trace(*arguments[key])
                texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
        raise Lowered

    compiler = "compile_all" if hasattr(module, "compile_all") else "compile_in_order"
    monkeypatch.setattr(module, compiler, lower)
    monkeypatch.setattr(device, "unsupported_reason", lambda *_: None)
    if script == "level_matmul":
        monkeypatch.setattr(module, "COPIES", 1)
    with pytest.raises(Lowered):
        module.main()
    assert len(texts) == count
    assert any("mosaic_gpu" in text for text in texts)


@pytest.mark.slow
def test_the_engine_on_a_cpu(tmp_path):
    output = tmp_path / "engine.json"
    command = [sys.executable, SCRIPTS / "engine_cpu.py", "--tokens", "4", "--slots", "2", "--output", output]
    subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, timeout=250)
    report = json.loads(output.read_text())
    assert [row["tokens"] for row in report["answers"]] == [64, 64]
    assert [(row["schema"], row["tokens"]) for row in report["grammar"]] == [(False, 8), (True, 8)]
    assert report["answers"][1]["different"] == 0
