"""The verb ``inspect``, on checkpoints that are supported and on others."""

import json

import hf_directories
import tiny_checkpoint
from family_cases import CASES

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.cli import inspect


def inspected(capsys, directory) -> tuple[int, dict]:
    """Returns the exit code and the report on a directory."""
    code = inspect.main([str(directory), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_hugging_face_checkpoint(tmp_path, capsys):
    directory = hf_directories.write(tmp_path / "model", CASES["gemma3"], shards=2)
    code, report = inspected(capsys, directory)
    assert (code, report["supported"], report["problems"]) == (0, True, [])
    assert (report["format"], report["family"]) == ("huggingface", "gemma3_text")
    assert "a window of 8 tokens in 2 of 3 layers" in report["options"]
    assert {"norms after the blocks", "the tanh approximation of GELU", "logits capped at 12"} <= set(
        report["options"]
    )
    assert report["sizes"]["head_dim"] == 32
    assert report["basis"].startswith("original: layers.0.attention_output_norm scales")
    assert "the activation function of the MLP, because it is not SiLU" in report["computed_by_xla"]
    assert not any("attention" in line for line in report["computed_by_xla"])
    assert report["stored"]["dtypes"] == {"BF16": report["parameters"]}
    assert report["stored"]["files"] == 2


def test_a_grinqh_checkpoint_as_text(capsys):
    assert inspect.main([str(BUNDLED_MODEL)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": a GRINQH checkpoint")
    assert "family      qwen3" in lines
    assert "kernels     all parts of a decode step" in lines
    assert lines[-1] == "supported   yes"
    assert any("codes of 8 bits" in line for line in lines)


def test_everything_in_the_way_is_named_at_once(tmp_path, capsys):
    config = hf_directories.QWEN3 | {"num_experts": 8, "hidden_act": "mish"}
    directory = hf_directories.write(
        tmp_path / "model", state=hf_directories.random_state(hf_directories.QWEN3)
    )
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{")
    code, report = inspected(capsys, directory)
    assert (code, report["supported"]) == (2, False)
    problems = "\n".join(report["problems"])
    assert "mixture of experts (num_experts 8)" in problems
    assert "hidden_act 'mish'" in problems
    assert "tokenizer.json" in problems


def test_tensors_that_do_not_match_are_named(tmp_path, capsys):
    state = hf_directories.random_state(hf_directories.QWEN3)
    del state["model.layers.1.mlp.up_proj.weight"]
    code, report = inspected(capsys, hf_directories.write(tmp_path / "model", state=state))
    assert code == 2
    assert report["problems"] == ["tensor model.layers.1.mlp.up_proj.weight is missing"]
    assert report["family"] == "qwen3"


def test_a_damaged_grinqh_checkpoint(tmp_path, capsys):
    directory = tiny_checkpoint.write(tmp_path / "model")
    next((directory / "state").rglob("d/*")).write_bytes(b"short")
    code, report = inspected(capsys, directory)
    assert (code, report["format"]) == (2, "grinqh")
    assert "has 5 bytes instead of" in report["problems"][0]


def test_a_directory_that_is_no_checkpoint(tmp_path, capsys):
    code, report = inspected(capsys, tmp_path)
    assert (code, report["format"]) == (2, "unknown")
    assert any("config.json" in problem for problem in report["problems"])


def test_a_missing_directory_is_one_line_on_stderr(tmp_path, capsys):
    assert inspect.main([str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
