"""Names of the tensors of Llama 3 and Qwen3 checkpoints."""

import re

TENSOR_NAMES = {
    "embed.embedding": ("model.embed_tokens.weight",),
    "layers.{i}.input_norm.scale": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.qkv.kernel": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.q_norm.scale": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.k_norm.scale": ("model.layers.{i}.self_attn.k_norm.weight",),
    "layers.{i}.o.kernel": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.post_norm.scale": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.gate_up.kernel": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.down.kernel": ("model.layers.{i}.mlp.down_proj.weight",),
    "norm.scale": ("model.norm.weight",),
    "lm_head.kernel": ("lm_head.weight",),
}
"""Names of the Hugging Face tensors that each parameter is made of, in the order of its outputs
(``layer_spec.parameter_shapes``). Hugging Face stores a kernel as ``[outputs, inputs]``."""

BASE = "model."
"""Prefix of all names but that of the head. Checkpoints saved from the model without its head lack it."""

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

IGNORED_TENSORS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers in old checkpoints. They follow from the configuration, so they are not read."""
