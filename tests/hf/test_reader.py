"""Hugging Face checkpoints: the parameters that are read, and the errors of damaged checkpoints."""

import json

import hf_directories
import jax.numpy as jnp
import numpy as np
import pytest
from forward_passes import forward
from hf_directories import LLAMA3, QWEN3
from huggingface_hub.utils import filter_repo_objects

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.errors import CheckpointError, GrinqhWarning, UnsupportedModelError
from grinqh_jax.hf import load_decoder, open_checkpoint, resolve
from grinqh_jax.hf.reader import HUB_IGNORED, HUB_PATTERNS

Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("hf_config", [QWEN3, LLAMA3], ids=["qwen3", "llama3"])
def test_parameters_equal_the_stored_tensors(tmp_path, hf_config, shards):
    state = hf_directories.random_state(hf_config)
    checkpoint = open_checkpoint(hf_directories.write(tmp_path, hf_config, state, shards))
    layer = "model.layers.1.self_attn."
    qkv = np.concatenate([state[f"{layer}{name}_proj.weight"] for name in "qkv"]).T
    np.testing.assert_array_equal(checkpoint.read("layers.1.qkv.kernel"), qkv)
    mlp = [state[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    np.testing.assert_array_equal(checkpoint.read("layers.0.gate_up.kernel"), np.concatenate(mlp).T)
    np.testing.assert_array_equal(checkpoint.read("norm.scale"), state["model.norm.weight"])
    head = state["model.embed_tokens.weight" if hf_config["tie_word_embeddings"] else "lm_head.weight"]
    np.testing.assert_array_equal(checkpoint.read("lm_head.kernel", slice(32, 96)), head[32:96].T)
    tokens = np.array([0, 5, 6, 7, 95, 2])
    np.testing.assert_array_equal(checkpoint.read("lm_head.kernel", tokens), head[tokens].T)
    for key, shape in checkpoint.parameters.items():
        value = checkpoint.read(key)
        assert (value.shape, value.dtype.name) == (shape, "bfloat16"), key


EMBEDDING = "model.embed_tokens.weight"


def logits(directory):
    """Returns the logits of transformers on the directory, and of the decoder on what the reader gives."""
    pytest.importorskip("torch")
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    return expected, forward(load_decoder(open_checkpoint(directory), jnp.float32), TOKENS)


TOKENS = np.arange(0, 300, 7)[None]


def ties() -> dict[str, tuple[dict, dict]]:
    """Returns configuration and tensors of each way to store embedding and head, and to name tensors."""
    state = hf_directories.random_state(QWEN3)
    head = np.ascontiguousarray(state[EMBEDDING][::-1])
    layer = "model.layers.0.self_attn."
    buffers = {f"{layer}rotary_emb.inv_freq": np.ones(8, np.float32)}
    untied = QWEN3 | {"tie_word_embeddings": False}
    no_key = {key: value for key, value in QWEN3.items() if key != "tie_word_embeddings"}
    only_head = {name: value for name, value in state.items() if name != EMBEDDING}
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    return {
        "embedding": (QWEN3, state | buffers),
        "equal head": (QWEN3, state | {"lm_head.weight": state[EMBEDDING]}),
        "other head": (QWEN3, state | {"lm_head.weight": head}),
        "only head": (QWEN3, only_head | {"lm_head.weight": state[EMBEDDING]}),
        "untied": (untied, state | {"lm_head.weight": head}),
        "no key": (no_key, state | {"lm_head.weight": head}),
        "no prefix": (QWEN3, bare),
        "no prefix, other head": (QWEN3, bare | {"lm_head.weight": head}),
        "some prefixes": (
            QWEN3,
            {n if "layers.0" in n else n.removeprefix("model."): v for n, v in state.items()},
        ),
        "prefix of the head": (untied, state | {"model.lm_head.weight": head}),
        "old buffers": (QWEN3, bare | {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}),
    }


@pytest.mark.parametrize("name", ties())
def test_ties_and_renamed_tensors_give_the_logits(tmp_path, name):
    hf_config, state = ties()[name]
    hf_directories.write(tmp_path, hf_config, state)
    if "other head" in name:
        with pytest.warns(GrinqhWarning, match="both are used"):
            theirs, ours = logits(tmp_path)
    else:
        theirs, ours = logits(tmp_path)
    assert np.max(np.abs(ours - theirs)) <= 1e-4 * np.max(np.abs(theirs))


def test_a_tied_model_with_another_head_is_untied(tmp_path):
    hf_config, state = ties()["other head"]
    with pytest.warns(GrinqhWarning, match="both are used"):
        checkpoint = open_checkpoint(hf_directories.write(tmp_path, hf_config, state))
    assert checkpoint.hf_config["tie_word_embeddings"] is False  # The converter copies it.
    assert not checkpoint.config.tie_word_embeddings
    np.testing.assert_array_equal(checkpoint.read("lm_head.kernel"), state["lm_head.weight"].T)
    np.testing.assert_array_equal(checkpoint.read("embed.embedding"), state[EMBEDDING])


@pytest.mark.parametrize("name", ["no prefix", "some prefixes", "only head", "equal head", "old buffers"])
def test_other_names_of_the_same_tensors_read_alike(tmp_path, name):
    expected = open_checkpoint(hf_directories.write(tmp_path / "plain"))
    checkpoint = open_checkpoint(hf_directories.write(tmp_path / "renamed", *ties()[name]))
    assert checkpoint.config == expected.config
    for key in expected.parameters:
        np.testing.assert_array_equal(checkpoint.read(key), expected.read(key))


def test_an_untied_model_without_a_head_is_refused(tmp_path):
    untied = QWEN3 | {"tie_word_embeddings": False}
    hf_directories.write(tmp_path, untied, hf_directories.random_state(QWEN3))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing \(if the embedding is the head"):
        open_checkpoint(tmp_path)


def test_two_names_of_one_parameter_are_refused(tmp_path):
    state = hf_directories.random_state(QWEN3)
    state["norm.weight"] = state["model.norm.weight"]
    message = r"tensors model\.norm\.weight and norm\.weight are the same parameter"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(hf_directories.write(tmp_path, QWEN3, state))


def test_every_wrong_tensor_is_named_at_once(tmp_path):
    state = hf_directories.random_state(QWEN3)
    del state[UP]
    state[Q] = state[Q][:-1]
    state["model.layers.7.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    state["model.norm.weight"] = state["model.norm.weight"].astype(np.int32)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(hf_directories.write(tmp_path, QWEN3, state, shards=2))
    message = str(error.value)
    assert f"tensor {UP} is missing" in message
    assert f"tensor {Q} has shape [63, 64], config.json asks for [64, 64]" in message
    assert "tensor model.layers.7.mlp.up_proj.weight is not part of a qwen3 model" in message
    assert "tensor model.norm.weight has dtype I32" in message
    assert "\n" not in message


def test_every_broken_file_is_named_at_once(tmp_path):
    state = hf_directories.random_state(QWEN3)
    first = sorted(state)[0]
    del state[first]
    hf_directories.write(tmp_path, QWEN3, state, shards=4)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3')
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    message = str(error.value)
    assert f"{shards[1].name} is missing" in message
    assert f"{shards[2].name} is truncated or corrupt" in message
    assert "config.json is not valid JSON" in message
    # With a valid config the tensors of the broken files are not reported again.
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    message = str(error.value)
    assert f"{shards[2].name} is truncated or corrupt" in message
    assert message.count("tensor ") == 1
    assert f"tensor {first} is missing" in message


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_single_file_is_refused(tmp_path, length):
    file = hf_directories.write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "holds list, expected an object"),
        ("{", "is not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"outside the directory: \.\./x\.safetensors"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, index, message):
    hf_directories.write(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_a_remedy(tmp_path):
    (hf_directories.write(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors files"):
        open_checkpoint(tmp_path)


def test_an_unsupported_option_is_named(tmp_path):
    hf_directories.write(tmp_path, QWEN3)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | {"mlp_bias": True}))
    with pytest.raises(UnsupportedModelError, match="mlp_bias"):
        open_checkpoint(tmp_path)


def test_a_quantized_checkpoint_is_not_a_source(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(QWEN3 | {"quantization_config": {"quant_method": "grinqh"}})
    )
    with pytest.raises(CheckpointError, match="GRINQH checkpoint already"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_after_opening_is_an_error_not_a_crash(tmp_path):
    checkpoint = open_checkpoint(hf_directories.write(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read tensor model"):
        checkpoint.read("norm.scale")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "nothing", "a/b/c"])
def test_a_name_that_is_neither_directory_nor_hub_id_is_refused(name):
    with pytest.raises(CheckpointError, match="not a directory"):
        resolve(name)


def test_hub_ids_work_offline_from_the_cache_or_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve("nobody/nothing")
    with pytest.raises(CheckpointError, match="valid hub id"):
        resolve("--/..")
    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    hf_directories.write(cached / "snapshots" / ("0" * 40))
    assert open_checkpoint("someone/tiny").config.num_layers == 2


def test_a_hub_id_downloads_every_file_of_a_grinqh_checkpoint_and_no_pickles():
    files = {str(file.relative_to(BUNDLED_MODEL)) for file in BUNDLED_MODEL.rglob("*") if file.is_file()}
    published = sorted(files | {"pytorch_model.bin", "original/model.safetensors", "original/config.json"})
    patterns, ignored = list(HUB_PATTERNS), list(HUB_IGNORED)
    wanted = set(filter_repo_objects(published, allow_patterns=patterns, ignore_patterns=ignored))
    assert wanted == files
