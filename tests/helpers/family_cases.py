"""Tiny configurations of every family that switch on each of its options."""

import numpy as np

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 500.0}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
_GLOBAL, _SLIDING, _DELTA = "full_attention", "sliding_attention", "linear_attention"


def _config(model_type: str, architecture: str, **options) -> dict:
    return _SIZES | {"model_type": model_type, "architectures": [architecture]} | options


_MIXTURES_ONLY = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}

CASES = {
    "llama-biases-linear": _config(
        "llama", "LlamaForCausalLM", attention_bias=True, mlp_bias=True, rope_parameters=_LINEAR
    ),
    "llama-yarn": _config("llama", "LlamaForCausalLM", rope_parameters=_YARN, hidden_act="gelu_pytorch_tanh"),
    "qwen2-tied-yarn": _config("qwen2", "Qwen2ForCausalLM", rope_parameters=_YARN, tie_word_embeddings=True),
    "qwen2-window": _config(
        "qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3-biases-window": _config(
        "qwen3",
        "Qwen3ForCausalLM",
        head_dim=24,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=[_SLIDING, _GLOBAL, _SLIDING],
    ),
    "qwen3-moe": _config(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        head_dim=24,
        attention_bias=True,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        rope_theta=1000.0,
    ),
    "qwen2-moe": _config(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=120,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        rope_theta=1000.0,
    ),
    "qwen3-moe-window": _config(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=136,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        hidden_act="gelu_pytorch_tanh",
        use_sliding_window=True,
        sliding_window=8,
        tie_word_embeddings=True,
    ),
    "mixtral": _config(
        "mixtral",
        "MixtralForCausalLM",
        head_dim=24,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters=_YARN,
    ),
    "olmoe": _config(
        "olmoe",
        "OlmoeForCausalLM",
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        attention_bias=True,
        rope_theta=1000.0,
    ),
    "gpt_oss": _config(
        "gpt_oss",
        "GptOssForCausalLM",
        head_dim=32,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=8,
        swiglu_alpha=2.5,
        swiglu_limit=1.25,
        hidden_act="silu",
        rope_scaling={key: value for key, value in _YARN.items() if key != "rope_theta"}
        | {"truncate": False, "beta_fast": 4.0, "beta_slow": 0.5},
        rope_theta=500.0,
    ),
    "gpt_oss-defaults": _config(
        "gpt_oss",
        "GptOssForCausalLM",
        head_dim=64,
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=8,
        num_key_value_heads=1,
        num_hidden_layers=2,
        num_local_experts=8,
        swiglu_limit=3.0,
        rope_theta=100.0,
        attention_bias=False,
        sliding_window=12,
        layer_types=[_GLOBAL, _SLIDING],
        tie_word_embeddings=True,
    ),
    "mistral": _config("mistral", "MistralForCausalLM", head_dim=32, sliding_window=8, rope_theta=1000.0),
    "ministral": _config(
        "ministral",
        "MinistralForCausalLM",
        head_dim=32,
        sliding_window=8,
        layer_types=[_SLIDING, _SLIDING, _GLOBAL],
    ),
    "ministral3": _config(
        "ministral3",
        "Ministral3ForCausalLM",
        head_dim=32,
        rope_parameters=_YARN
        | {
            "original_max_position_embeddings": 8,
            "mscale": 1.0,
            "mscale_all_dim": 2.0,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "llama_4_scaling_beta": 0.4,
        },
    ),
    "smollm3": _config(
        "smollm3",
        "SmolLM3ForCausalLM",
        no_rope_layer_interval=2,
        rope_theta=1000.0,
        use_sliding_window=True,
        sliding_window=8,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "granite": _config(
        "granite",
        "GraniteForCausalLM",
        embedding_multiplier=6.0,
        attention_multiplier=0.4,
        residual_multiplier=0.3,
        logits_scaling=4.0,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "phi3-partial-window": _config(
        "phi3", "Phi3ForCausalLM", partial_rotary_factor=0.75, sliding_window=9, rope_theta=1000.0
    ),
    "phi3-longrope": _config(
        "phi3",
        "Phi3ForCausalLM",
        partial_rotary_factor=0.5,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [2.0, 3.0, 4.0, 6.0],
        },
    ),
    "olmo2": _config("olmo2", "Olmo2ForCausalLM", attention_bias=True, rope_theta=1000.0),
    "olmo3-window-yarn": _config(
        "olmo3",
        "Olmo3ForCausalLM",
        sliding_window=8,
        layer_types=[_SLIDING, _SLIDING, _GLOBAL],
        rope_parameters={_GLOBAL: _YARN, _SLIDING: {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "gemma3": _config(
        "gemma3_text",
        "Gemma3ForCausalLM",
        head_dim=32,
        sliding_window=8,
        layer_types=[_SLIDING, _SLIDING, _GLOBAL],
        query_pre_attn_scalar=24,
        final_logit_softcapping=12.0,
        attention_bias=True,
        rope_parameters={_GLOBAL: _LINEAR, _SLIDING: {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "qwen3_5": _config(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        head_dim=32,
        attention_bias=True,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        linear_conv_kernel_dim=4,
        layer_types=[_DELTA, _GLOBAL, _DELTA],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    ),
    "qwen3_5-tied-yarn": _config(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        head_dim=64,
        full_attention_interval=2,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=24,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=3,
        rope_parameters=_YARN | {"partial_rotary_factor": 0.25},
        tie_word_embeddings=True,
    ),
    "qwen3_5-moe": _MIXTURES_ONLY
    | {
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "layer_types": [_DELTA, _DELTA, _GLOBAL],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 40,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    },
    "gemma3-old-spelling": _config(
        "gemma3_text",
        "Gemma3ForCausalLM",
        head_dim=256,
        sliding_window=8,
        sliding_window_pattern=2,
        rope_theta=1000.0,
        rope_local_base_freq=50.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        tie_word_embeddings=True,
    ),
}
"""Hugging Face configurations by name. Together they switch on every option of every family."""

TOKENS = np.random.default_rng(17).integers(0, _SIZES["vocab_size"], (2, 40))
"""Tokens that logits are compared on: windows and original contexts are shorter."""
