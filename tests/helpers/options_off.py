"""Models with one of their options switched off."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import Attention, ClampedSwiGLU, GatedMLP, LayerSpec
from grinqh_jax.model.parameters import norms
from grinqh_jax.model.rope import RopeConfig


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
    for field in ("window", "head_norms", "qkv_limit", "score_scale", "score_soft_cap", "query_growth"):
        if attention is not None and getattr(attention, field) is not None:
            yield field, lambda layer, field=field: _with_attention(layer, **{field: None})
    if attention is not None and attention.sinks:
        yield "sinks", lambda layer: _with_attention(layer, sinks=False)
    ropes = [layer.attention.rope for layer in config.layers if layer.attention is not None]
    if len(set(ropes)) > 1:
        first = next(rope for rope in ropes if rope is not None)
        yield "a rope of each layer", lambda layer: _with_attention(layer, rope=first)
    if attention is not None and attention.rope is not None:
        plain = RopeConfig(theta=attention.rope.theta)
        for field in ("type", "rotary_dim", "attention_factor", "channel_factors", "truncate"):
            if getattr(attention.rope, field) != getattr(plain, field):
                yield f"rope {field}", lambda layer, field=field: _with_rope(layer, field)
    for field, off in {"norm_after": None, "multiplier": 1.0}.items():
        if any(getattr(block, field) != off for block in spec.blocks):
            yield field, lambda layer, field=field, off=off: _with_blocks(layer, **{field: off})
    if any(isinstance(block.mixer, GatedMLP) and block.mixer != GatedMLP() for block in spec.blocks):
        yield "activation", _with_silu
    if spec.experts is not None:
        yield "normalized probabilities", lambda layer: _with_mixture(layer, "normalized")
        yield "number of chosen experts", lambda layer: _with_mixture(layer, "chosen")
        if spec.experts.shared:
            yield "shared expert", lambda layer: _with_mixture(layer, "shared")
        if spec.experts.activation != "silu":
            yield "activation of experts", lambda layer: _with_mixture(layer, "activation")
        if isinstance(spec.experts.activation, ClampedSwiGLU):
            yield "alpha", lambda layer: _with_mixture(layer, "alpha")
            yield "clamp", lambda layer: _with_mixture(layer, "limit")


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
    off = {
        "normalized": not mixture.normalized,
        "chosen": mixture.chosen - 1,
        "activation": "silu",
        "shared": False,
    }
    if field in _CLAMP_OFF:
        activation = dataclasses.replace(mixture.activation, **{field: _CLAMP_OFF[field]})
        changed = dataclasses.replace(mixture, activation=activation)
    else:
        changed = dataclasses.replace(mixture, **{field: off[field]})
    blocks = [dataclasses.replace(b, mixer=changed) if b.mixer == mixture else b for b in layer.blocks]
    return LayerSpec(tuple(blocks))


_CLAMP_OFF = {"alpha": 1.0, "limit": 1e9}
"""Options of the clamped SwiGLU that switch one of them off."""


def _with_rope(layer: LayerSpec, field: str) -> LayerSpec:
    rope = None if layer.attention is None else layer.attention.rope
    if rope is None:
        return layer
    off = {"type": "default", "rotary_dim": None, "attention_factor": 1.0, "truncate": True}
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
