"""Configurations read from Hugging Face's ``config.json``."""

import pytest
from random_models import CONFIGS

from grinqh_jax.errors import UnsupportedModelError
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.families import FAMILIES
from grinqh_jax.model.rope import RopeConfig

LLAMA = CONFIGS["llama3-scaled-rope-gqa"]
QWEN3 = CONFIGS["qwen3-tied-gqa"]

WIDE = {"num_attention_heads": 64}


def test_old_and_new_spellings_agree():
    scaling = {**LLAMA["rope_scaling"]}
    without = {k: v for k, v in LLAMA.items() if k not in ("rope_scaling", "rope_theta")}
    spellings = [
        without | {"rope_theta": 500.0, "rope_scaling": scaling},
        without | {"rope_theta": 500.0, "rope_scaling": {**scaling, "type": "llama3", "rope_type": None}},
        without | {"rope_parameters": scaling | {"rope_theta": 500.0}},
        without | {"rope_parameters": {"rope_type": "default"}, "rope_scaling": scaling, "rope_theta": 500.0},
    ]
    del spellings[1]["rope_scaling"]["rope_type"]
    first, *others = (ModelConfig.from_hf(s) for s in spellings)
    expected = RopeConfig(
        theta=500.0,
        type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    assert [layer.attention.rope for layer in first.layers] == [expected] * first.num_layers
    assert all(other == first for other in others)


def test_absent_and_null_keys_have_defaults():
    llama = ModelConfig.from_hf(CONFIGS["llama-tied-mha"] | {"head_dim": None})
    assert (llama.head_dim, llama.num_kv_heads) == (16, 4)
    assert llama.layers[0].attention.head_norms is None
    assert llama.layers[0].attention.rope == RopeConfig(theta=10000.0)
    qwen3 = ModelConfig.from_hf({k: v for k, v in QWEN3.items() if k != "head_dim"})
    assert (qwen3.head_dim, qwen3.tie_word_embeddings) == (128, True)
    assert qwen3.layers[0].attention.head_norms is not None
    assert hash(llama) != hash(qwen3)
    absent = {"num_key_value_heads", "max_position_embeddings"}
    defaults = ModelConfig.from_hf({k: v for k, v in QWEN3.items() if k not in absent} | WIDE)
    assert (defaults.num_kv_heads, defaults.max_position_embeddings) == (32, 32768)
    assert ModelConfig.from_hf(QWEN3 | {"num_key_value_heads": None}).num_kv_heads == 4


def test_null_in_place_of_an_object_is_its_default():
    """As in transformers: the ropes of gpt-oss and Ministral 3 are YaRN unless a configuration says more."""
    for model_type in ("gpt_oss", "ministral3"):
        absent = ModelConfig.from_hf({"model_type": model_type})
        assert absent.layers[0].attention.rope.type == "yarn"
        assert ModelConfig.from_hf({"model_type": model_type, "rope_parameters": None}) == absent


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    theirs = {key: theirs.get(key) for key in theirs.keys() - NOT_READ}
    assert ModelConfig.from_hf({"model_type": model_type}) == ModelConfig.from_hf(
        theirs | {"model_type": model_type}
    )


NOT_READ = {"transformers_version", "architectures"}
"""Keys of transformers' configurations that say nothing about the model."""


def test_model_type_stands_in_for_missing_architectures():
    assert ModelConfig.from_hf({k: v for k, v in QWEN3.items() if k != "architectures"}).family == "qwen3"


def test_unused_sliding_window_and_grinqh_quantization_are_accepted():
    accepted = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
    assert ModelConfig.from_hf(QWEN3 | accepted) == ModelConfig.from_hf(QWEN3)
    ModelConfig.from_hf(QWEN3 | {"quantization_config": {"quant_method": "grinqh", "version": 1}})


UNSUPPORTED = {
    "architecture OlmoForCausalLM": {"architectures": ["OlmoForCausalLM"]},
    "architecture LlamaForCausalLM with model_type 'qwen3', not llama": {
        "architectures": ["LlamaForCausalLM"]
    },
    "per_layer_config, which changes single layers": {"per_layer_config": {"0": {"head_dim": 8}}},
    "mixture of experts (num_experts 8)": {"num_experts": 8},
    "mlp_bias": {"mlp_bias": True},
    "hidden_act 'mish'": {"hidden_act": "mish"},
    "layer_types sliding_attention without a sliding_window": {
        "layer_types": ["full_attention", "sliding_attention"]
    },
    "layer_types chunked_attention": {"layer_types": ["full_attention", "chunked_attention"]},
    "layer_types has 1 entries for 2 layers": {"layer_types": ["full_attention"]},
    "rope type 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}},
    "partial_rotary_factor 0.5": {"partial_rotary_factor": 0.5},
    "already quantized by gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "vocab_size is None": {"vocab_size": None},
    "hidden_size is '64'": {"hidden_size": "64"},
    "rms_norm_eps is -1": {"rms_norm_eps": -1},
    "num_attention_heads 4 is not a multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
    "head_dim 15 is odd": {"head_dim": 15},
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_each_unsupported_option_is_named(message):
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_hf(QWEN3 | UNSUPPORTED[message])
    assert message in str(caught.value)


def test_all_unsupported_options_are_named_at_once():
    everything = dict(QWEN3)
    for options in UNSUPPORTED.values():
        everything |= options if "architectures" not in options else {}
    expected = [message for message, options in UNSUPPORTED.items() if options.items() <= everything.items()]
    assert len(expected) >= 11
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_hf(everything)
    assert [message for message in expected if message not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["architectures", "layer_types"])
@pytest.mark.parametrize("value", [5, "Qwen3ForCausalLM", [["Qwen3ForCausalLM"]]])
def test_a_value_that_is_no_list_of_names_is_refused(key, value):
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_hf(QWEN3 | {key: value})
    expected = f"unsupported model configuration: {key} is {value!r}, expected a list of names"
    assert str(caught.value) == expected


def test_rope_parameters_for_each_kind_of_layer_are_refused():
    nested = {"rope_parameters": {"full_attention": {"rope_type": "default"}}}
    with pytest.raises(UnsupportedModelError, match=r"for each kind of layer \(full_attention\)"):
        ModelConfig.from_hf(QWEN3 | nested)


GEMMA3_TEXT = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}


def test_yarn_of_a_kind_of_layer_that_does_not_truncate_is_refused():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 32}
    sliding = {"rope_type": "default", "rope_theta": 50.0}

    def config(**options):
        ropes = {"full_attention": yarn | options, "sliding_attention": sliding}
        return ModelConfig.from_hf(GEMMA3_TEXT | {"rope_parameters": ropes})

    assert config(truncate=True) == config()
    with pytest.raises(UnsupportedModelError, match="truncate False in the rope of full_attention"):
        config(truncate=False)


def test_a_soft_cap_of_logits_beside_a_vision_tower_is_refused():
    """transformers applies it in a text model, and not where there is a vision tower."""
    capped = GEMMA3_TEXT | {"final_logit_softcapping": 8.0}
    assert ModelConfig.from_hf(capped).logit_transform.soft_cap == 8
    with pytest.raises(UnsupportedModelError, match=r"final_logit_softcapping .* beside a vision tower"):
        ModelConfig.from_hf({"model_type": "gemma3", "text_config": capped})


def test_llama3_rope_needs_its_factors():
    scaling = {"rope_type": "llama3", "factor": 8.0}
    with pytest.raises(UnsupportedModelError, match="lacks low_freq_factor, high_freq_factor"):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": scaling})


def test_a_stated_window_of_llama_is_refused():
    with pytest.raises(UnsupportedModelError, match="sliding_window 128"):
        ModelConfig.from_hf(LLAMA | {"sliding_window": 128})
