"""The configuration of a model, read from a Hugging Face ``config.json`` and validated."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from grinqh_jax.errors import UnsupportedModelError, UsageError
from grinqh_jax.model.config_reader import ConfigReader
from grinqh_jax.model.families import family_of
from grinqh_jax.model.families.family import Family
from grinqh_jax.model.layer_spec import Description
from grinqh_jax.model.rope import RopeConfig

BIASES = ("attention_bias", "mlp_bias")
"""Keys of biases, which a family that does not implement them refuses."""

VISION_MODELS = {
    "gemma3": ("gemma3_text", True),
    "mistral3": ("mistral", True),
    "qwen3_5": ("qwen3_5_text", False),
    "qwen3_5_moe": ("qwen3_5_moe_text", False),
}
"""``model_type`` of models with a vision tower whose text part is supported, that part's default type, and
whether the output projection is the transposed embedding by default."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of a mixture of experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Description):
    """Sizes and structure of a decoder-only model. Hashable, so it can be static under ``jit``.

    Attributes:
      family: ``model_type`` of its family (``families.FAMILIES``).
      intermediate_size: Width of the MLP: outputs of the gate projection, and of the up projection.
      num_heads: Number of query heads.
      num_kv_heads: Number of key heads, and of value heads.
      head_dim: Width of a head. ``num_heads * head_dim`` may differ from ``hidden_size``.
      tie_word_embeddings: Whether the output projection is the transposed embedding.
      max_position_embeddings: Maximum context, in tokens.
      long_text: Maximum length of texts that are read as a whole, without a cache, in tokens, if LongRoPE
        makes it larger than the context; 0 otherwise.
      has_vision: Whether the checkpoint also holds a vision tower, which is left out.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    long_text: int = 0
    has_vision: bool = False

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face configuration in the spellings of transformers 4 and 5.

        Args:
          hf: Parsed ``config.json``. Keys that do not change the computation are ignored.

        Raises:
          UnsupportedModelError: Something is missing, malformed or not implemented: another architecture,
            activation function or rotary embedding, kind of mixture of experts, weights quantized by another
            method. One message names all problems.
        """
        reader, config = cls.read(hf)
        if reader.problems:
            raise UnsupportedModelError("unsupported model configuration: " + "; ".join(reader.problems))
        return config

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> tuple[ConfigReader, "ModelConfig"]:
        """Reads a configuration as ``from_hf`` does, and returns a reader that holds its problems.

        If there are problems, the configuration has arbitrary values in their place.
        """
        hf, has_vision = _text_part(hf)
        reader = ConfigReader(hf)
        family = family_of(reader)
        reader = reader.with_defaults(family.defaults)
        hidden_size = reader.integer("hidden_size")
        num_heads = reader.integer("num_attention_heads")
        num_kv_heads = reader.integer("num_key_value_heads", num_heads)
        head_dim = reader.integer("head_dim", max(hidden_size // num_heads, 1))
        if num_heads % num_kv_heads:
            reader.problem(
                f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        if head_dim % 2:
            reader.problem(f"head_dim {head_dim} is odd")
        description = family.describe(reader)
        _refuse_options(reader, family)
        if has_vision and (cap := reader.values.get("final_logit_softcapping")):
            # ``Gemma3ForConditionalGeneration`` of transformers 5.24 does not apply it.
            reader.problem(
                f"final_logit_softcapping {cap} beside a vision tower, where transformers ignores it"
            )
        config = cls(
            **{field.name: getattr(description, field.name) for field in dataclasses.fields(description)},
            family=family.model_type,
            vocab_size=reader.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.integer("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=reader.switch("tie_word_embeddings"),
            max_position_embeddings=_context(reader, family, description),
            long_text=_long_text(reader, description),
            has_vision=has_vision,
        )
        return reader, config

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def longest_text(self) -> int:
        """Maximum length of texts that are read as a whole, without a cache, in tokens."""
        return max(self.max_position_embeddings, self.long_text)

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Raises UsageError if a token is outside the vocabulary; JAX would clip it to another token."""
        outside = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise UsageError(
                f"token {outside} is outside the model's vocabulary of {self.vocab_size}: "
                "the tokens or the tokenizer belong to another model"
            )


def _text_part(hf: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Returns the configuration of the text part of a model, and whether the model has a vision tower."""
    defaults, text = VISION_MODELS.get(str(hf.get("model_type"))), hf.get("text_config")
    if defaults is None or not isinstance(text, Mapping):
        return hf, False
    default_type, tied = defaults
    around = {"tie_word_embeddings": hf.get("tie_word_embeddings", tied)}
    if "quantization_config" in hf:
        around["quantization_config"] = hf["quantization_config"]
    return {"model_type": default_type, **text, **around, "architectures": None}, True


def _context(reader: ConfigReader, family: Family, description: Description) -> int:
    """Returns the maximum context: that of the configuration, or the original one of LongRoPE."""
    limits = [rope.original_max_position_embeddings for rope in _longropes(description)]
    key = "max_position_embeddings"
    return min([reader.integer(key, family.defaults[key]), *limits])


def _long_text(reader: ConfigReader, description: Description) -> int:
    """Returns ``ModelConfig.long_text``."""
    return reader.integer("max_position_embeddings") if _longropes(description) else 0


def _longropes(description: Description) -> list[RopeConfig]:
    """Returns the rotary embeddings of type ``longrope``, one for each layer that has it."""
    ropes = (layer.attention.rope for layer in description.layers if layer.attention is not None)
    return [rope for rope in ropes if rope is not None and rope.type == "longrope"]


def _refuse_options(reader: ConfigReader, family: Family) -> None:
    """Reports every option that changes the computation and is not implemented."""
    reader.refuse(*(key for key in BIASES if key not in family.biases))
    if reader.values.get("per_layer_config"):
        reader.problem("per_layer_config, which changes single layers")
    for experts in EXPERTS:
        if reader.values.get(experts) and not family.mixtures:
            reader.problem(f"mixture of experts ({experts} {reader.values[experts]})")
    quantization = reader.section("quantization_config").values
    if quantization and quantization.get("quant_method") not in ("grinqh", family.quant_method):
        reader.problem(
            f"weights already quantized by {quantization.get('quant_method', 'an unnamed method')} "
            "(use the unquantized checkpoint)"
        )
