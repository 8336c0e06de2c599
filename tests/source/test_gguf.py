"""GGUF files: the model in one is the model in safetensors, weight by weight, or it is refused by name."""

import gc
import json
import re
import warnings

import gguf
import gguf_files
import hf_directories
import jax.numpy as jnp
import mixtures
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from byte_model import TEMPLATE
from forward_passes import forward
from huggingface_hub import ModelCard
from marks import slow
from random_models import CONFIGS

from checkpoints_tools.convert import command
from checkpoints_tools.source.gguf_file.rope import llama3_scaling
from checkpoints_tools.source.open import open_source
from grinqh_jax.checkpoint import load
from grinqh_jax.checkpoint.manifest import Manifest
from grinqh_jax.errors import CheckpointError, GrinqhError, GrinqhWarning, UnsupportedModelError
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.text.tokenizer import Tokenizer

MODELS = {"llama3": hf_directories.LLAMA3, "qwen3": hf_directories.QWEN3} | {
    name: config | {"vocab_size": 300} for name, config in CONFIGS.items()
}
MODELS["qwen3-moe"] = mixtures.HF_CONFIG | {"mlp_only_layers": [], "moe_intermediate_size": 96}


TURN = {"role": "user", "content": "hi"}
ENDS = {"tokenizer.ggml.eos_token_id": 290, "tokenizer.ggml.eot_token_id": 291}


def write(path, hf_config, state=None, **options):
    state = hf_directories.random_state(hf_config) if state is None else state
    options.setdefault("tokenizer", tiny_models.tokenizer_with_merges())
    options["metadata"] = ENDS | options.get("metadata", {})
    return gguf_files.write(path, hf_config, state, **options)


@pytest.mark.parametrize("model", ["llama3", "qwen3", *slow(*CONFIGS)])
def test_configuration_and_weights_are_those_of_the_safetensors(model, tmp_path):
    hf_config = MODELS[model]
    original = open_checkpoint(hf_directories.write(tmp_path / "hf", hf_config))
    source = open_source(write(tmp_path / "model.gguf", hf_config, matrix_type="BF16"))
    assert source.config == original.config
    for key in original.parameters:
        value = source.read(key)
        np.testing.assert_array_equal(value.astype(ml_dtypes.bfloat16), original.read(key), err_msg=key)
        assert value.dtype == (np.float32 if "norm" in key else ml_dtypes.bfloat16)
    tokens = np.arange(24)[None] % 300
    logits = [forward(load_decoder(checkpoint, jnp.float32), tokens) for checkpoint in (source, original)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_every_type_reads_as_the_package_dequantizes_it(kind, tmp_path):
    state = hf_directories.random_state(hf_directories.LLAMA3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GrinqhWarning)
        source = open_source(write(tmp_path / "model.gguf", hf_directories.LLAMA3, state, matrix_type=kind))
    quantized = gguf.GGMLQuantizationType[kind]
    for name, value in state.items():
        stored = source.read_tensor(name)
        expected = value.astype(np.float32)
        if value.ndim > 1:
            expected = gguf.dequantize(gguf.quantize(expected, quantized), quantized)
        np.testing.assert_array_equal(stored.astype(np.float32), expected, err_msg=name)


def test_rows_are_read_alone(tmp_path):
    source = open_source(write(tmp_path / "model.gguf", hf_directories.LLAMA3, matrix_type="Q8_0"))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        whole = source.read_tensor(name)
        np.testing.assert_array_equal(source.read_tensor(name, slice(3, 17)), whole[3:17])
        rows = np.array([5, 6, 7, 100, 2, 3])
        np.testing.assert_array_equal(source.read_tensor(name, rows), whole[rows])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_follows_from_the_divisors(factor):
    config = hf_directories.LLAMA3 | {"head_dim": 128, "rope_scaling": scaling(factor, 8192)}
    divisors = gguf_files.divisors(ModelConfig.from_hf(config))
    assert llama3_scaling(divisors, 500000.0) == scaling(factor, 8192)


@pytest.mark.parametrize("head_dim", [2, 4, 8, 16])
@pytest.mark.parametrize("original", [16, 64, 1024])
def test_few_divisors_yield_a_scaling_with_the_same_divisors(head_dim, original):
    hf_config = hf_directories.LLAMA3 | {"head_dim": head_dim, "rope_scaling": scaling(8.0, original)}
    divisors = gguf_files.divisors(ModelConfig.from_hf(hf_config))
    if divisors.max() == 1:
        pytest.skip("no frequency is scaled")
    found = llama3_scaling(divisors, 500000.0)
    same = gguf_files.divisors(ModelConfig.from_hf(hf_config | {"rope_scaling": found}))
    np.testing.assert_allclose(same, divisors, rtol=1e-3)


def test_other_divisors_are_refused(tmp_path):
    assert llama3_scaling(np.array([1.0, 1.2, 1.1, 8.0, 2.0, 8.0, 7.0, 8.0]), 10000.0) is None


def scaling(factor, original):
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def test_tokens_and_chat_text_are_those_of_the_tokenizer_in_the_file(tmp_path):
    path = write(tmp_path / "model.gguf", hf_directories.QWEN3, chat_template=TEMPLATE)
    source = open_source(path)
    loaded, original = Tokenizer.load(source.directory), tiny_models.tokenizer_with_merges()
    text = tiny_models.TEXT + "<|turn|>it's<think> 12 ünï\n\n<|end|>"
    assert loaded.encode(text) == original.encode(text).ids
    assert loaded.decode(loaded.encode(text)) == original.decode(original.encode(text).ids)
    messages = [TURN]
    assert loaded.chat_text(messages) == "<|turn|>user: hi\n<|turn|>assistant:"
    generation = json.loads((source.directory / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [290, 291]}


def test_sampling_defaults_and_other_templates_are_carried(tmp_path):
    metadata = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ 'tools' }}",
    }
    source = open_source(
        write(tmp_path / "model.gguf", hf_directories.QWEN3, chat_template=TEMPLATE, metadata=metadata)
    )
    generation = json.loads((source.directory / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"], generation["do_sample"]) == (0.5, 20, True)
    assert Tokenizer.load(source.directory).chat_text([TURN], template="tool_use") == "tools"


def test_the_directory_of_the_tokenizer_lives_as_long_as_the_checkpoint(tmp_path):
    source = open_source(write(tmp_path / "model.gguf", hf_directories.QWEN3))
    directory = source.directory
    assert {"config.json", "tokenizer.json"} <= {path.name for path in directory.iterdir()}
    del source
    gc.collect()
    assert not directory.parent.exists()


def test_a_conversion_is_that_of_the_safetensors_and_both_get_model_cards(tmp_path):
    hf_config = hf_directories.QWEN3
    directory = hf_directories.write(tmp_path / "hf", hf_config)
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# The source\n")
    path = write(tmp_path / "model.gguf", hf_config, matrix_type="BF16")
    source = open_source(path)
    for file in source.companions:
        (directory / file.name).write_bytes(file.read_bytes())
    calib = tiny_models.text_file(tmp_path / "text.txt")
    flags = ["--calib", str(calib), "--tokens", "256", "--no-refit", "--gains", "none", "--basis", "original"]
    leaves = []
    for model, licence in ((directory, "mit"), (path, "apache-2.0")):
        out = tmp_path / f"{model.stem}-grinqh"
        assert command.main(["--model", str(model), "--out", str(out), *flags]) == 0
        leaves.append(Manifest.read(out).leaves)
        assert (out / "tokenizer.json").exists()
        card = (out / "README.md").read_text()
        assert ModelCard(card).data.license == licence
        assert "| architecture | qwen3, 2 layers, hidden size 64 |" in card
        assert '"text": "text.txt"' in card
        (out / "README.md").write_text("another card")
        load(out)  # no checksum covers the card
    assert leaves[0] == leaves[1]


def test_fewer_than_8_bits_are_named(tmp_path):
    path = write(tmp_path / "model.gguf", hf_directories.QWEN3, matrix_type="Q4_0")
    with pytest.warns(GrinqhWarning, match=re.escape("already (Q4_0, 4.5 bits, 15 of 15 matrices)")):
        open_source(path)


@pytest.mark.parametrize(
    ("metadata", "options", "reason"),
    [
        ({"qwen3.block_count": 3}, {}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"qwen3.feed_forward_length": 97}, {}, r"has shape \[96, 64\], config.json asks for \[97, 64\]"),
        ({"qwen3.attention.head_count": None}, {}, "lacks qwen3.attention.head_count;"),
        ({"split.count": 3}, {}, "split over 3 files; merge them"),
        ({"qwen3.rope.scaling.type": "yarn"}, {}, "rope type 'yarn'"),
        ({"qwen3.rope.dimension_count": 8}, {}, "partial_rotary_factor 0.5"),
        ({"qwen3.attention.sliding_window": 64}, {}, "sliding_window 64"),
        ({"qwen3.expert_count": 4}, {}, "mixture of experts"),
        ({"tokenizer.ggml.eos_token_id": 300}, {}, "the eos token is 300"),
        ({}, {"pre": "tekken"}, "pre-tokenizer 'tekken' .*llama-bpe.*use the model's safetensors"),
        ({}, {"tokenizer": None}, "tokenizer None"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(metadata, options, reason, tmp_path):
    path = write(tmp_path / "model.gguf", hf_directories.QWEN3, metadata=metadata, **options)
    with pytest.raises(GrinqhError, match=reason):
        open_source(path)


def test_an_expert_is_read_alone_and_a_mixture_without_its_sizes_is_refused(tmp_path):
    state = hf_directories.random_state(MODELS["qwen3-moe"])
    source = open_source(write(tmp_path / "model.gguf", MODELS["qwen3-moe"], state, matrix_type="Q8_0"))
    kernel = source.read("layers.1.experts_gate_up.kernel", slice(3, 5))
    q8 = gguf.GGMLQuantizationType.Q8_0
    for expert, read in zip((3, 4), kernel, strict=True):
        stored = [state[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
        both = np.concatenate(stored).astype(np.float32)
        np.testing.assert_array_equal(read.T, gguf.dequantize(gguf.quantize(both, q8), q8))
    lacking = {"qwen3moe.expert_used_count": None}
    with pytest.raises(CheckpointError, match=r"lacks qwen3moe\.expert_used_count;"):
        open_source(write(tmp_path / "lacking.gguf", MODELS["qwen3-moe"], state, metadata=lacking))


def test_other_architectures_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="architecture 'falcon'"):
        open_source(path)


def test_types_that_are_not_dequantized_are_refused(tmp_path):
    state = hf_directories.random_state(hf_directories.QWEN3)
    path = write(tmp_path / "model.gguf", hf_directories.QWEN3, state, matrix_type="F32")
    data = path.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    assert data[at : at + 4] == bytes(4)  # F32
    path.write_bytes(data[:at] + gguf.GGMLQuantizationType.I32.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(UnsupportedModelError, match="tensors of type I32"):
        open_source(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_truncated_file_is_refused(share, tmp_path):
    path = write(tmp_path / "model.gguf", hf_directories.QWEN3)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="download it again"):
        open_source(path)
