"""Configurations with every spelling of the rotary embedding, and with contradicting ones."""

import itertools

_BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_FAMILIES = {
    "llama": _BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3": _BASE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_OBJECTS = {
    "absent": None,
    "empty": {},
    "theta": {"rope_theta": 700.0},
    "null_theta": {"rope_theta": None, "rope_type": "default"},
    "default": {"rope_type": "default", "rope_theta": 900.0},
    "default_with_factor": {"type": "default", "factor": 4.0},
    "llama3": _LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 32},
    "llama3_old_key": _LLAMA3 | {"type": "llama3", "rope_theta": 300.0},
    "two_types": _LLAMA3 | {"rope_type": "llama3", "type": "yarn", "original_max_position_embeddings": 16},
    "null_type": _LLAMA3 | {"rope_type": None, "type": "llama3"},
    "null_factor": _LLAMA3 | {"rope_type": "llama3", "factor": None},
    "no_factor": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "nested": {"full_attention": _LLAMA3 | {"rope_type": "llama3", "rope_theta": 500.0}},
}
_BESIDE = {
    "": {},
    "theta": {"rope_theta": 500.0},
    "original": {"rope_theta": 500.0, "original_max_position_embeddings": 64},
    "null_theta": {"rope_theta": None},
}


def _cases() -> dict[str, dict]:
    scalings = ("absent", "empty", "default", "default_with_factor", "llama3_old_key", "yarn", "nested")
    cases = {}
    for family, new, old, beside in itertools.product(_FAMILIES, _OBJECTS, scalings, _BESIDE):
        config = _FAMILIES[family] | _BESIDE[beside]
        config |= {} if _OBJECTS[new] is None else {"rope_parameters": _OBJECTS[new]}
        config |= {} if _OBJECTS[old] is None else {"rope_scaling": _OBJECTS[old]}
        cases[f"{family}-{new}-{old}-{beside}"] = config
    return cases


CASES = _cases()
