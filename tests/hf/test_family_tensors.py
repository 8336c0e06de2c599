"""Tensors of the families: fused kernels, biases, norm scales with an offset, the text of a vision model."""

import hf_directories
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, TOKENS

from grinqh_jax.cli.inspect import report_of
from grinqh_jax.errors import CheckpointError, UnsupportedModelError
from grinqh_jax.hf import load_decoder, open_checkpoint, params
from grinqh_jax.hf.stored_together import as_stored
from grinqh_jax.hf.survey import survey_checkpoint

GEMMA = {k: v for k, v in CASES["gemma3"].items() if k != "final_logit_softcapping"}
"""Without the soft cap that is refused beside a vision tower."""

VISION = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {k: v for k, v in GEMMA.items() if k != "architectures"},
    "vision_config": {"hidden_size": 8},
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_tensors_are_made_of_each_other(name, tmp_path):
    state = hf_directories.random_state(CASES[name])
    checkpoint = open_checkpoint(hf_directories.write(tmp_path, CASES[name], state))
    tensors = {}
    for key, shape in checkpoint.parameters.items():
        value = checkpoint.read(key)
        assert value.shape == shape, key
        tensors |= as_stored(checkpoint.config, params.to_tensors(checkpoint.config, key, value))
    assert tensors.keys() == state.keys()
    for tensor, value in state.items():
        np.testing.assert_allclose(tensors[tensor].astype(np.float32), value.astype(np.float32), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qwen2-moe", "qwen3-moe", "mixtral", "olmoe", "qwen3_5-moe", "qwen3-next", "gpt_oss"]
)
def test_mixtures_are_read_as_transformers_saves_them(name, tmp_path):
    """transformers 5 fuses experts in memory and writes each to a tensor of its own."""
    pytest.importorskip("torch")
    from record_logits import logits, torch_model

    model = torch_model(CASES[name])
    model.save_pretrained(tmp_path)
    ours, theirs = load_decoder(open_checkpoint(tmp_path), jnp.float32)(TOKENS), logits(model, TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-moe", "qwen3_5-moe"])
def test_experts_that_are_stored_together(name, tmp_path):
    """As checkpoints of Qwen3.5-MoE have them."""
    state = hf_directories.random_state(CASES[name])
    single = open_checkpoint(hf_directories.write(tmp_path / "single", CASES[name], state))
    together = {key: value for key, value in state.items() if ".experts." not in key}
    for layer, spec in enumerate(single.config.layers):
        if spec.experts is None:
            continue
        experts, prefix = range(CASES[name]["num_experts"]), f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([state[f"{prefix}.{e}.{part}_proj.weight"] for e in experts])
            for part in ("gate", "up", "down")
        )
        together[f"{prefix}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        together[f"{prefix}.down_proj"] = down
    checkpoint = open_checkpoint(hf_directories.write(tmp_path / "together", CASES[name], together))
    assert checkpoint.parameters == single.parameters
    for key in single.parameters:
        np.testing.assert_array_equal(checkpoint.read(key), single.read(key))
    transposed = dict(together)
    transposed[f"{prefix}.down_proj"] = np.ascontiguousarray(down.swapaxes(1, 2))
    with pytest.raises(CheckpointError, match=rf"tensor {prefix}.down_proj is not part of a qwen"):
        open_checkpoint(hf_directories.write(tmp_path / "transposed", CASES[name], transposed))


@pytest.mark.parametrize("width", [24, 100])
def test_a_shared_expert_of_another_width_has_zeros_behind_its_channels(width, tmp_path):
    config = CASES["qwen3_5-moe"] | {"shared_expert_intermediate_size": width}
    each = config["moe_intermediate_size"]
    whole = -(-width // each) * each
    state = hf_directories.random_state(config)
    padded = dict(state)
    for name, value in state.items():
        if ".shared_expert." in name:
            grown = [whole if size == width else size for size in value.shape]
            padded[name] = np.zeros(grown, value.dtype)
            padded[name][: value.shape[0], : value.shape[1]] = value
    narrow = open_checkpoint(hf_directories.write(tmp_path / "narrow", config, state))
    config = config | {"shared_expert_intermediate_size": whole}
    wide = open_checkpoint(hf_directories.write(tmp_path / "wide", config, padded))
    assert narrow.config.mixture.shared == wide.config.mixture.shared == whole // each
    stored = {}
    for key in wide.parameters:
        value = narrow.read(key)
        np.testing.assert_array_equal(value, wide.read(key))
        stored |= as_stored(narrow.config, params.to_tensors(narrow.config, key, value))
    assert {name: value.shape for name, value in stored.items()} == {n: v.shape for n, v in state.items()}


def test_a_missing_bias_is_named(tmp_path):
    state = hf_directories.random_state(CASES["qwen2-window"])
    del state["model.layers.2.self_attn.k_proj.bias"]
    hf_directories.write(tmp_path, CASES["qwen2-window"], state)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.2.self_attn.k_proj.bias is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_vision_model_is_read(prefix, tmp_path):
    state = hf_directories.random_state(CASES["gemma3"])
    vision = {prefix + name.removeprefix("model."): value for name, value in state.items()}
    vision["vision_tower.vision_model.post_layernorm.weight"] = np.ones(8, np.float32)
    text = open_checkpoint(hf_directories.write(tmp_path / "text", GEMMA, state))
    whole = open_checkpoint(hf_directories.write(tmp_path / "vision", VISION, vision))
    assert whole.config.has_vision
    assert whole.config.layers == text.config.layers
    assert whole.parameters == text.parameters
    for key in text.parameters:
        np.testing.assert_array_equal(whole.read(key), text.read(key))


def test_vision_and_multi_token_prediction_of_qwen3_5_are_left_out(tmp_path):
    state = hf_directories.random_state(CASES["qwen3_5"])
    whole = {name.replace("model.", "model.language_model.", 1): value for name, value in state.items()}
    whole["model.visual.patch_embed.proj.weight"] = np.ones(8, np.float32)
    whole["mtp.layers.0.mlp.down_proj.weight"] = np.ones((8, 8), np.float32)
    text = open_checkpoint(hf_directories.write(tmp_path / "text", CASES["qwen3_5"], state))
    config = {k: v for k, v in CASES["qwen3_5"].items() if k != "architectures"}
    config = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": config,
        "vision_config": {"hidden_size": 8},
    }
    checkpoint = open_checkpoint(hf_directories.write(tmp_path / "whole", config, whole))
    assert checkpoint.config.has_vision
    assert checkpoint.config.layers == text.config.layers
    assert not checkpoint.config.tie_word_embeddings
    for key in text.parameters:
        np.testing.assert_array_equal(checkpoint.read(key), text.read(key))
    assert report_of(survey_checkpoint(tmp_path / "whole"))["options"][-2:] == [
        "the vision tower is left out",
        "the multi-token prediction head is left out",
    ]
    alone = dict(state) | {"mtp.norm.weight": np.ones(8, np.float32)}
    open_checkpoint(hf_directories.write(tmp_path / "text_and_heads", CASES["qwen3_5"], alone))
    other = hf_directories.random_state(CASES["olmo2"]) | {"mtp.norm.weight": np.ones(8, np.float32)}
    with pytest.raises(CheckpointError, match=r"mtp.norm.weight is not part of a olmo2 model"):
        open_checkpoint(hf_directories.write(tmp_path / "other", CASES["olmo2"], other))


def test_a_quantized_vision_model_is_refused(tmp_path):
    config = VISION | {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(UnsupportedModelError, match="already quantized by fp8"):
        open_checkpoint(hf_directories.write(tmp_path, config, {"a": np.ones(1, np.float32)}))
