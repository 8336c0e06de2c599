"""A checkpoint reads as it was written, and everything else is refused with its remedy."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import HF_CONFIG, QUANTIZATION, assert_same, random_tree, unpack_version_1, write

from grinqh_jax.checkpoint import QuantizationConfig, load, writer
from grinqh_jax.checkpoint.manifest import Manifest
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_shapes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("roundtrip") / "tiny")


@pytest.fixture
def own_checkpoint(tmp_path):
    """A checkpoint that the test may damage."""
    return write(tmp_path / "tiny")


def rewrite(checkpoint, leaves=lambda leaves: leaves, config=lambda config: config):
    """Changes a checkpoint's configuration and the leaves of its manifest; corrects the file checksums."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(config(json.loads(path.read_text()))))
    Manifest.of_directory(checkpoint, leaves(dict(Manifest.read(checkpoint).leaves))).write(checkpoint)


def test_round_trip(checkpoint):
    loaded = load(checkpoint)
    assert loaded.config == ModelConfig.from_hf(HF_CONFIG)
    assert loaded.quantization == QUANTIZATION
    assert loaded.directory == checkpoint
    assert_same(loaded.model, random_tree())


def test_companions_and_configuration_are_copied(checkpoint):
    assert json.loads((checkpoint / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    assert json.loads((checkpoint / "tokenizer.json").read_text()) == {"model": "none"}
    config = json.loads((checkpoint / "config.json").read_text())
    assert config.pop("quantization_config") == QUANTIZATION.to_json()
    assert config == HF_CONFIG


def test_the_compute_dtype_is_float32_on_a_cpu_or_as_asked(checkpoint):
    assert load(checkpoint).model.compute_dtype == jnp.float32
    assert load(checkpoint, jnp.bfloat16).model.compute_dtype == jnp.bfloat16


def test_shardings_are_honoured_and_their_names_checked(checkpoint):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))
    model = load(checkpoint, shardings={"lm_head.blocks.0.planes": sharding}).model
    assert model.linear("lm_head.blocks.0").planes[...].sharding == sharding
    with pytest.raises(UsageError, match=r"lm_head\.blocks\.0\.plane$"):
        load(checkpoint, shardings={"lm_head.blocks.0.plane": sharding})


def test_all_mismatches_are_in_one_message(own_checkpoint):
    def change(leaves):
        leaves["layers.0.o.planes"] = dataclasses.replace(leaves["layers.0.o.planes"], shape=(3, 128, 4))
        leaves["layers.0.qkv.scales"] = dataclasses.replace(leaves["layers.0.qkv.scales"], dtype="float32")
        leaves["layers.7.o.planes"] = leaves.pop("layers.0.down.planes")
        return leaves

    rewrite(own_checkpoint, leaves=change, config=lambda config: config | {"vocab_size": 47})
    (own_checkpoint / "tokenizer.json").unlink()
    (own_checkpoint / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    (own_checkpoint / "state" / "stray").touch()
    with pytest.raises(CheckpointError) as caught:
        load(own_checkpoint)
    message = str(caught.value)
    assert "\n" not in message
    for expected in (
        "layers.0.o.planes has shape [3, 128, 4], expected [2, 128, 4]",
        "layers.0.qkv.scales has dtype float32, expected float16",
        "layers.7.o.planes is unknown to this model",
        "layers.0.down.planes is missing",
        "embed.embedding has shape [48, 32], expected [47, 32]",
        "tokenizer.json is missing",
        "generation_config.json has checksum",
        "state/stray does not belong here",
    ):
        assert expected in message


def test_arrays_that_differ_from_their_checksum_are_refused(own_checkpoint):
    def change(leaves):
        leaves["norm.scale"] = dataclasses.replace(leaves["norm.scale"], checksum="crc32:00000000")
        return leaves

    rewrite(own_checkpoint, leaves=change)
    with pytest.raises(CheckpointError, match=r"norm\.scale was written as"):
        load(own_checkpoint)


def test_values_that_would_give_wrong_logits_are_refused(tmp_path, monkeypatch):
    tree = random_tree()
    columns, head = tree["lm_head"]["columns"], tree["lm_head"]["blocks"]["0"]
    columns[columns == 7] = 8  # two tokens with the logit of one
    head["thresholds"][2] = head["thresholds"][2, ::-1]
    tree["layers"]["0"]["o"]["thresholds"][0, 0] = -0.01
    problems = (
        "lm_head.columns must hold each number from 0 to 47 once, and lacks 7",
        "lm_head.blocks.0.thresholds must ascend from 0 or more along its last axis",
        "layers.0.o.thresholds must ascend",
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.o\.thresholds must ascend"):
        write(tmp_path / "refused", tree)
    monkeypatch.setattr(writer, "value_problems", lambda arrays: [])  # Another writer may not check.
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path / "tiny", tree))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tiny'} is damaged (copy or download it again, or convert")
    assert all(problem in message for problem in problems)
    assert message.count(" must ") == len(problems)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"version": 3}, "version is 3, this grinqh-jax reads 1 and 2; install a newer"),
        ({"version": 0}, "version is 0, this grinqh-jax reads 1 and 2; convert the model again"),
        ({"version": "one"}, "version is 'one'"),
        ({"version": True}, "version is True"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq', expected 'grinqh'; convert the original"),
        ({"max_bits": 3, "targets": 5}, "max_bits must be 2, 4, 6 or 8, not 3; targets must be a list"),
        ({"targets": [1.0, 2.0, 4.0]}, "equal steps"),
        ({"targets": [1.0, 10**400]}, "from 0 to 8"),
        ({"targets": [1.0, 2.0, 3.0]}, "end at max_bits"),
        ({"surprise": 1}, "surprise is unknown"),
    ],
)
def test_quantization_config_of_another_kind(own_checkpoint, entry, message):
    rewrite(
        own_checkpoint,
        config=lambda c: c | {"quantization_config": c["quantization_config"] | entry},
    )
    with pytest.raises(CheckpointError) as caught:
        load(own_checkpoint)
    assert message in str(caught.value)


def test_quantization_config_refuses_what_it_could_not_read_back():
    with pytest.raises(CheckpointError, match="max_bits"):
        QuantizationConfig(max_bits=5, targets=(1.0, 5.0))


def test_paths_without_a_finished_checkpoint_are_refused_with_a_remedy(tmp_path):
    def message(path) -> str:
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such directory" in message(tmp_path / "nothing")
    directory = tmp_path / "model"
    directory.mkdir()
    assert "config.json is missing" in message(directory)
    (directory / "config.json").write_text(json.dumps(HF_CONFIG))
    assert "convert the original model again" in message(directory)
    (directory / "pytorch_model.bin").touch()
    assert "pickled .bin weights" in message(directory)
    (directory / "model.safetensors").touch()
    assert f"grinqh-jax convert --model {directory}" in message(directory)
    (directory / "config.json").write_text("[1, 2")
    assert "not valid JSON" in message(directory)
    (directory / "config.json").write_text("[1, 2]")
    assert "holds list, expected an object" in message(directory)
    assert "is not a directory" in message(directory / "config.json")


def test_version_1_is_stored_as_the_present_version(tmp_path):
    """``test_format`` compares its weights with a reader of version 1."""
    directory = unpack_version_1(tmp_path)
    manifest = Manifest.read(directory)
    assert manifest.leaves["layers.0.gate_up.planes"].shape == (2, 128, 64)
    model = load(directory).model
    for name, shape in linear_shapes(model.config).items():
        weight = model.linear(name).weight
        weight.check(name)
        assert weight.scales.shape[1] == {560: 576, 64: 64, 32: 64, 512: 512, 88: 128}[shape[1]]
        assert not np.asarray(weight.scales)[:, shape[1] :].any()


def test_version_1_is_verified_and_sharded(tmp_path):
    directory = unpack_version_1(tmp_path)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))
    model = load(directory, shardings={"layers.0.down.planes": sharding}).model
    assert model.linear("layers.0.down").planes[...].sharding == sharding

    def change(leaves):
        name = "layers.0.down.planes"
        leaves[name] = dataclasses.replace(leaves[name], checksum="crc32:00000000")
        return leaves

    rewrite(directory, leaves=change)
    with pytest.raises(CheckpointError, match=r"layers\.0\.down\.planes was written as"):
        load(directory)


TWO_DEVICES = """
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from tiny_checkpoint import assert_same, random_tree

from grinqh_jax.checkpoint import load

mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec(None, None, "model"))
model = load(sys.argv[1], shardings={"layers.0.qkv.planes": split}).model
planes = model.layers[0].qkv.planes[...]
assert planes.sharding == split
assert [shard.data.shape for shard in planes.addressable_shards] == [(2, 128, 2)] * 2
assert_same(model, random_tree())
"""


def test_an_array_is_sharded_over_two_devices(checkpoint):
    tests = Path(__file__).parents[1]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tests / "helpers"), str(tests.parent)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, str(checkpoint)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
