"""Tiny configurations of every family that switch on each of its options, and models with one option off."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import Attention, GatedMLP, LayerSpec
from grinqh_jax.model.parameters import norms
from grinqh_jax.model.rope import RopeConfig

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


def with_one_option_off(config: ModelConfig, tree: dict) -> Iterator[tuple[str, ModelConfig, dict]]:
    """Yields ``(option, configuration, state tree)`` with one option off, for each option of a model."""
    seen = set()
    for spec in config.layers:
        for option, change in _changes(spec, config):
            if option not in seen:
                seen.add(option)
                layers = tuple(change(layer) for layer in config.layers)
                yield option, dataclasses.replace(config, layers=layers), tree
    if config.embedding_multiplier != 1:
        yield "embedding multiplier", dataclasses.replace(config, embedding_multiplier=1.0), tree
    for field, off in {"multiplier": 1.0, "soft_cap": None}.items():
        if getattr(config.logit_transform, field) != off:
            transform = dataclasses.replace(config.logit_transform, **{field: off})
            yield f"logit {field}", dataclasses.replace(config, logit_transform=transform), tree
    flat = flatten_dict(tree, sep=".")
    for bias in {key.split(".", 2)[2] for key in flat if key.endswith(".bias")}:
        without = {key: 0 * value if key.endswith(bias) else value for key, value in flat.items()}
        yield bias, config, unflatten_dict(without, sep=".")
    yield from _without_gates(config, tree)
    for name, off in _DELTA_OFF.items():
        if any(key.endswith(name) for key in flat):
            changed = {key: off(value) if key.endswith(name) else value for key, value in flat.items()}
            yield name, config, unflatten_dict(changed, sep=".")
    offsets = {f"{name}.scale": norm.offset for name, norm in norms(config).items()}
    if any(offsets.values()):
        stored = {key: value - offsets.get(key, 0) for key, value in flat.items()}
        yield "offset of norm scales", config, unflatten_dict(stored, sep=".")


_DELTA_OFF = {
    ".delta.convolution": lambda filters: (
        0 * filters + (np.arange(filters.shape[-1]) == filters.shape[-1] - 1)
    ),
    ".delta.log_decay": lambda rates: rates - 100,
    ".delta.step_bias": lambda biases: 0 * biases,
    ".delta_norm.scale": lambda scales: 0 * scales + 1,
}
"""Functions that switch parameters of a gated delta net off: no filter, no decay, no bias, no scale."""


def _without_gates(config: ModelConfig, tree: dict) -> Iterator[tuple[str, ModelConfig, dict]]:
    """Yields a model without the gates of attention, if it has any."""
    if not any(spec.attention is not None and spec.attention.output_gate for spec in config.layers):
        return

    def without(outputs: np.ndarray) -> np.ndarray:
        width = 2 * config.num_heads * config.head_dim
        pairs = outputs[..., :width].reshape(*outputs.shape[:-1], config.num_heads, 2, config.head_dim)
        queries = pairs[..., 0, :].reshape(*outputs.shape[:-1], -1)
        return np.concatenate([queries, outputs[..., width:]], axis=-1)

    flat = flatten_dict(tree, sep=".")
    flat = {key: without(value) if ".qkv." in key else value for key, value in flat.items()}
    layers = tuple(_with_attention(layer, output_gate=False) for layer in config.layers)
    layers = tuple(
        LayerSpec(
            tuple(
                dataclasses.replace(
                    block, reads=dataclasses.replace(block.reads, outputs=("query", "key_value", "key_value"))
                )
                if isinstance(block.mixer, Attention)
                else block
                for block in layer.blocks
            )
        )
        for layer in layers
    )
    yield "gates of attention", dataclasses.replace(config, layers=layers), unflatten_dict(flat, sep=".")


def _changes(spec: LayerSpec, config: ModelConfig) -> Iterator[tuple[str, object]]:
    """Yields ``(option, function)`` of the options of a layer; the function switches it off in any layer."""
    attention = spec.attention
    for field in ("window", "head_norms", "score_scale", "score_soft_cap", "query_growth"):
        if attention is not None and getattr(attention, field) is not None:
            yield field, lambda layer, field=field: _with_attention(layer, **{field: None})
    ropes = [layer.attention.rope for layer in config.layers if layer.attention is not None]
    if len(set(ropes)) > 1:
        first = next(rope for rope in ropes if rope is not None)
        yield "a rope of each layer", lambda layer: _with_attention(layer, rope=first)
    if attention is not None and attention.rope is not None:
        plain = RopeConfig(theta=attention.rope.theta)
        for field in ("type", "rotary_dim", "attention_factor", "channel_factors"):
            if getattr(attention.rope, field) != getattr(plain, field):
                yield f"rope {field}", lambda layer, field=field: _with_rope(layer, field)
    for field, off in {"norm_after": None, "multiplier": 1.0}.items():
        if any(getattr(block, field) != off for block in spec.blocks):
            yield field, lambda layer, field=field, off=off: _with_blocks(layer, **{field: off})
    if any(block.mixer == GatedMLP("gelu_tanh") for block in spec.blocks):
        yield "activation", _with_silu
    if spec.experts is not None:
        yield "normalized probabilities", lambda layer: _with_mixture(layer, "normalized")
        yield "number of chosen experts", lambda layer: _with_mixture(layer, "chosen")
        if spec.experts.activation != "silu":
            yield "activation of experts", lambda layer: _with_mixture(layer, "activation")


def _with_blocks(layer: LayerSpec, **fields) -> LayerSpec:
    return LayerSpec(tuple(dataclasses.replace(block, **fields) for block in layer.blocks))


def _with_attention(layer: LayerSpec, **fields) -> LayerSpec:
    return LayerSpec(
        tuple(
            dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **fields))
            if isinstance(block.mixer, Attention)
            else block
            for block in layer.blocks
        )
    )


def _with_mixture(layer: LayerSpec, field: str) -> LayerSpec:
    mixture = layer.experts
    if mixture is None:
        return layer
    off = {"normalized": not mixture.normalized, "chosen": mixture.chosen - 1, "activation": "silu"}
    changed = dataclasses.replace(mixture, **{field: off[field]})
    blocks = [dataclasses.replace(b, mixer=changed) if b.mixer == mixture else b for b in layer.blocks]
    return LayerSpec(tuple(blocks))


def _with_rope(layer: LayerSpec, field: str) -> LayerSpec:
    rope = None if layer.attention is None else layer.attention.rope
    if rope is None:
        return layer
    off = {"type": "default", "rotary_dim": None, "attention_factor": 1.0}
    if field == "channel_factors":
        off = {field: (1.0,) * len(rope.channel_factors)}
    elif field == "rotary_dim" and rope.channel_factors:
        off = {field: None, "type": "default"}
    else:
        off = {field: off[field]}
    return _with_attention(layer, rope=dataclasses.replace(rope, **off))


def _with_silu(layer: LayerSpec) -> LayerSpec:
    return LayerSpec(
        tuple(
            dataclasses.replace(block, mixer=GatedMLP("silu")) if isinstance(block.mixer, GatedMLP) else block
            for block in layer.blocks
        )
    )
