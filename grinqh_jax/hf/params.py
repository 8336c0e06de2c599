"""Which Hugging Face tensors make which of our parameters: one table, read in both directions."""

import dataclasses
import re

from grinqh_jax.model.config import ModelConfig

TABLE = {
    "model.embed_tokens.weight": ("embed.embedding", "vocab hidden"),
    "model.layers.{i}.input_layernorm.weight": ("layers.{i}.input_norm.scale", "hidden"),
    "model.layers.{i}.self_attn.q_proj.weight": ("layers.{i}.qkv.kernel", "query hidden"),
    "model.layers.{i}.self_attn.k_proj.weight": ("layers.{i}.qkv.kernel", "key_value hidden"),
    "model.layers.{i}.self_attn.v_proj.weight": ("layers.{i}.qkv.kernel", "key_value hidden"),
    "model.layers.{i}.self_attn.q_norm.weight": ("layers.{i}.q_norm.scale", "head"),
    "model.layers.{i}.self_attn.k_norm.weight": ("layers.{i}.k_norm.scale", "head"),
    "model.layers.{i}.self_attn.o_proj.weight": ("layers.{i}.o.kernel", "hidden query"),
    "model.layers.{i}.post_attention_layernorm.weight": ("layers.{i}.post_norm.scale", "hidden"),
    "model.layers.{i}.mlp.gate_proj.weight": ("layers.{i}.gate_up.kernel", "intermediate hidden"),
    "model.layers.{i}.mlp.up_proj.weight": ("layers.{i}.gate_up.kernel", "intermediate hidden"),
    "model.layers.{i}.mlp.down_proj.weight": ("layers.{i}.down.kernel", "hidden intermediate"),
    "model.norm.weight": ("norm.scale", "hidden"),
    "lm_head.weight": ("lm_head.kernel", "vocab hidden"),
}
"""Hugging Face name -> (our key, shape in axis names). Keys that end in ``kernel`` are transposed to
``[in, out]``; names that share a key are concatenated along the outputs, in this order."""

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Buffers of old checkpoints that the config determines."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One Hugging Face tensor that a parameter is made of, and the shape that it must have."""

    name: str
    shape: tuple[int, ...]


def sources(config: ModelConfig) -> dict[str, list[Source]]:
    """Every parameter of the model (our dotted key) and the tensors it is made of, in order.

    A tied model has no ``lm_head.weight``; its ``lm_head.kernel`` is made of the embedding.
    """
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "query": config.num_heads * config.head_dim,
        "key_value": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
    }
    result: dict[str, list[Source]] = {}
    for name, (key, axes) in TABLE.items():
        if key.endswith(("q_norm.scale", "k_norm.scale")) and not config.qk_norm:
            continue
        if key == "lm_head.kernel" and config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        shape = tuple(sizes[axis] for axis in axes.split())
        for i in range(config.num_layers) if "{i}" in name else (0,):
            result.setdefault(key.format(i=i), []).append(Source(name.format(i=i), shape))
    return result


def is_kernel(key: str) -> bool:
    """Whether a parameter is a matrix ``[in, out]``, the transpose of what Hugging Face stores."""
    return key.endswith(".kernel")


def mismatches(
    config: ModelConfig, found: dict[str, tuple[int, ...]], unreadable: frozenset[str] = frozenset()
) -> list[str]:
    """All differences between the tensors that ``config`` asks for and those that a checkpoint holds.

    Args:
      config: of the model.
      found: name -> shape of the checkpoint's tensors.
      unreadable: names that an index places in files that could not be read; not reported again.
    """
    expected = {source.name: source.shape for parts in sources(config).values() for source in parts}
    problems = [
        f"tensor {name} has shape {list(found[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    missing = sorted(expected.keys() - found.keys() - unreadable)
    # A tied model may carry its head a second time: transformers ignores that copy, and so do we.
    extra = sorted(name for name in found.keys() - expected.keys() if not IGNORED.fullmatch(name))
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
    problems += [f"tensor {name} is missing" for name in missing]
    problems += [f"tensor {name} is not part of a {config.architecture} model" for name in extra]
    return problems
