"""A checkpoint as safetensors files and back: all bits stay the same."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from checkpoints_tools.export.__main__ import main
from checkpoints_tools.export.exchange import INDEX, read_safetensors, write_safetensors
from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.checkpoint import load
from grinqh_jax.checkpoint.manifest import Manifest
from grinqh_jax.errors import CheckpointError
from grinqh_jax.model.decoder import checkpoint_leaves


@pytest.fixture(scope="module")
def exported(graded_directory, tmp_path_factory):
    return write_safetensors(graded_directory, tmp_path_factory.mktemp("export") / "out", shard_bytes=50_000)


def test_the_way_there_and_back_keeps_every_bit(graded_directory, exported, tmp_path, capsys):
    assert len(list(exported.glob("*.safetensors"))) > 1
    assert main(["--model", str(exported), "--out", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'back'}: a GRINQH checkpoint\n"
    before, after = (Manifest.read(path) for path in (graded_directory, tmp_path / "back"))
    assert before.leaves == after.leaves  # names, shapes, dtypes, checksums
    configs = [
        json.loads((path / "config.json").read_text()) for path in (graded_directory, tmp_path / "back")
    ]
    assert configs[0] == configs[1]
    for file in graded_directory.glob("*.json"):
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()


def test_the_files_hold_the_leaves_of_the_bundled_model(tmp_path, capsys):
    assert main(["--model", str(BUNDLED_MODEL), "--out", str(tmp_path / "out")]) == 0
    assert "safetensors files" in capsys.readouterr().out
    leaves = checkpoint_leaves(load(BUNDLED_MODEL).model)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"]) == set(leaves)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in leaves.values())
    (name,) = set(index["weight_map"].values())
    with safe_open(tmp_path / "out" / name, framework="flax") as file:
        for leaf, array in leaves.items():
            assert np.asarray(file.get_tensor(leaf)).tobytes() == np.asarray(array).tobytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "grinqh"


def test_wrong_directories_are_refused(exported, graded_directory, tmp_path, capsys):
    assert main(["--model", str(graded_directory), "--out", str(exported)]) != 0
    assert f"{exported} exists; choose another directory" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in exported.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    first = sorted(damaged.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=f"{first.name}: .*; copy it again"):
        read_safetensors(damaged, tmp_path / "back")
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name}: .*; copy it again"):
        read_safetensors(damaged, tmp_path / "back")
    index = json.loads((damaged / INDEX).read_text())
    index["weight_map"]["norm.scale"] = "../norm.safetensors"
    (damaged / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is no file of its directory"):
        read_safetensors(damaged, tmp_path / "back")
