"""The configuration of a model, read from a Hugging Face ``config.json`` and validated."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from grinqh_jax.errors import UnsupportedModelError, UsageError

ARCHITECTURES: dict[str, Literal["llama", "qwen3"]] = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}
"""Supported ``architectures`` entries and their ``model_type``."""

ROPE_TYPES = ("default", "llama3")

DEFAULT_ROPE_THETA = 10000.0
"""Base of the rotary frequencies in a configuration that names none, for both architectures."""

QWEN3_HEAD_DIM = 128
"""Head dimension of a Qwen3 configuration that names none. For Llama it is ``hidden_size / num_heads``."""

QWEN3_KV_HEADS = 32
"""Number of key heads (and of value heads) of a Qwen3 configuration without ``num_key_value_heads``. If the
entry is null, or if a Llama configuration lacks it, there is one for each query head."""

MAX_POSITIONS = {"llama": 2048, "qwen3": 32768}
"""Maximum context, in tokens, of a configuration that names none, by ``model_type``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Parameters of the rotary position embedding. Only ``llama3`` uses the fields after ``type``.

    The fields have the names and meanings of Hugging Face's; ``rope.inverse_frequencies`` has the formula.
    """

    theta: float = DEFAULT_ROPE_THETA
    type: Literal["default", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and options of a decoder-only model. Hashable, so it can be static under ``jit``.

    Attributes:
      intermediate_size: Width of the MLP: outputs of the gate projection, and of the up projection.
      num_heads: Number of query heads.
      num_kv_heads: Number of key heads, and of value heads.
      head_dim: Width of a head. ``num_heads * head_dim`` may differ from ``hidden_size``.
      tie_word_embeddings: Whether the output projection is the transposed embedding.
      qk_norm: Whether an RMS norm is applied to every query and key head before the rotation, as in Qwen3.
      max_position_embeddings: Maximum context, in tokens.
    """

    architecture: Literal["llama", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face configuration in the spellings of transformers 4 and 5.

        Args:
          hf: Parsed ``config.json``. Keys that do not change the computation are ignored.

        Raises:
          UnsupportedModelError: Something is missing, malformed or not implemented: another architecture,
            activation function or rotary embedding, mixture of experts, sliding windows, biases, weights
            quantized by another method. One message names all problems.
        """
        reader = _Reader(hf)
        architecture = _architecture(reader)
        hidden_size = reader.integer("hidden_size")
        num_heads = reader.integer("num_attention_heads")
        if architecture == "qwen3" and "num_key_value_heads" not in hf:
            num_kv_heads = QWEN3_KV_HEADS
        else:
            num_kv_heads = reader.integer("num_key_value_heads", num_heads)
        default_head_dim = QWEN3_HEAD_DIM if architecture == "qwen3" else hidden_size // max(num_heads, 1)
        head_dim = reader.integer("head_dim", default_head_dim)
        if num_heads % max(num_kv_heads, 1):
            reader.problem(
                f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        if head_dim % 2:
            reader.problem(f"head_dim {head_dim} is odd")
        max_positions = reader.integer("max_position_embeddings", MAX_POSITIONS[architecture])
        config = cls(
            architecture=architecture,
            vocab_size=reader.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.integer("intermediate_size"),
            num_layers=reader.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope=_rope(reader, max_positions),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qk_norm=architecture == "qwen3",
            max_position_embeddings=max_positions,
        )
        _refuse_options(reader)
        if reader.problems:
            raise UnsupportedModelError("unsupported model configuration: " + "; ".join(reader.problems))
        return config

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Raises UsageError if a token is outside the vocabulary; JAX would clip it to another token."""
        outside = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise UsageError(
                f"token {outside} is outside the model's vocabulary of {self.vocab_size}: "
                "the tokenizer belongs to another model"
            )


class _Reader:
    """Reads values of a parsed JSON object and collects all their problems."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        """Adds a problem, once."""
        if text not in self.problems:
            self.problems.append(text)

    def integer(self, key: str, default: int | None = None) -> int:
        """Reads a positive integer. If the key is absent or null, returns the default or notes a problem."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problem(f"{key} is {value!r}, expected a positive integer")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """Reads a positive, finite number. Returns the default if the key is absent or null."""
        return default if self.values.get(key) is None else self.number_not_null(key, default)

    def number_not_null(self, key: str, default: float) -> float:
        """Reads a positive, finite number. Returns the default if the key is absent; null is a problem."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.problem(f"{key} is {value!r}, expected a positive number")
            return default
        return float(value)

    def names(self, key: str) -> list[str]:
        """Reads a list of strings, empty if absent or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.problem(f"{key} is {value!r}, expected a list of names")
            return []
        return value

    def section(self, key: str) -> "_Reader":
        """Returns a reader of a nested object, empty if absent, that shares this reader's problems."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.problem(f"{key} is {value!r}, expected an object")
            value = None
        nested = _Reader(value or {})
        nested.problems = self.problems
        return nested


def _architecture(reader: _Reader) -> Literal["llama", "qwen3"]:
    """Reads ``architectures``, or without it ``model_type``."""
    names = reader.names("architectures")
    model_type = reader.values.get("model_type")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    for supported_type in ARCHITECTURES.values():
        if not names and model_type == supported_type:
            return supported_type
    unsupported = f"architecture {', '.join(names)}" if names else f"model_type {model_type!r}"
    reader.problem(f"{unsupported} (supported: {', '.join(ARCHITECTURES)})")
    return "llama"


def _rope(reader: _Reader, max_positions: int) -> RopeConfig:
    """Resolves all spellings of the rotary embedding as transformers 5 does.

    A ``rope_scaling`` that is not empty (transformers 4) replaces ``rope_parameters`` (transformers 5) as a
    whole. A ``rope_theta`` inside that object wins over one at the top level of the configuration, and
    ``rope_type`` wins over ``type``. For ``original_max_position_embeddings`` the top level wins.
    """
    scaling = reader.section("rope_scaling")
    rope = scaling if scaling.values else reader.section("rope_parameters")
    for source in (reader, rope):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            reader.problem(f"partial_rotary_factor {source.values['partial_rotary_factor']}")
    # Other model families nest one such object for each kind of layer. In a Llama or Qwen3 configuration,
    # transformers fails on nested objects or ignores them silently.
    if layers := [key for key, value in rope.values.items() if isinstance(value, Mapping)]:
        reader.problem(f"rope parameters for each kind of layer ({', '.join(layers)})")
        return RopeConfig()
    theta = (rope if "rope_theta" in rope.values else reader).number_not_null(
        "rope_theta", DEFAULT_ROPE_THETA
    )
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ROPE_TYPES:
        reader.problem(f"rope type {kind!r} (supported: {', '.join(ROPE_TYPES)})")
    if kind != "llama3":
        return RopeConfig(theta=theta)
    missing = [k for k in ("factor", "low_freq_factor", "high_freq_factor") if k not in rope.values]
    if missing:
        reader.problem(f"llama3 rope lacks {', '.join(missing)}")
    original = "original_max_position_embeddings"
    rope_config = RopeConfig(
        theta=theta,
        type="llama3",
        factor=rope.number_not_null("factor", 1.0),
        low_freq_factor=rope.number_not_null("low_freq_factor", 1.0),
        high_freq_factor=rope.number_not_null("high_freq_factor", 4.0),
        original_max_position_embeddings=(reader if original in reader.values else rope).integer(
            original, max_positions
        ),
    )
    if rope_config.high_freq_factor <= rope_config.low_freq_factor:
        reader.problem(
            f"llama3 rope has high_freq_factor {rope_config.high_freq_factor:g} <= "
            f"low_freq_factor {rope_config.low_freq_factor:g}"
        )
    return rope_config


def _refuse_options(reader: _Reader) -> None:
    """Reports every option that changes the computation and is not implemented."""
    hf = reader.values
    for bias in ("attention_bias", "mlp_bias"):
        if hf.get(bias):
            reader.problem(bias)
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        reader.problem(f"hidden_act {activation!r} (supported: silu)")
    other_layers = sorted(set(reader.names("layer_types")) - {"full_attention"})
    if other_layers:
        reader.problem(f"layer_types {', '.join(other_layers)} (supported: full_attention)")
    # Qwen3 names a window and switches it off by use_sliding_window. Without that switch the window applies.
    window = hf.get("sliding_window")
    if window is not None and hf.get("use_sliding_window", "use_sliding_window" not in hf):
        reader.problem(f"sliding_window {window}")
    for experts in ("num_experts", "num_local_experts", "n_routed_experts"):
        if hf.get(experts):
            reader.problem(f"mixture of experts ({experts} {hf[experts]})")
    quantization = reader.section("quantization_config").values
    if quantization and quantization.get("quant_method") != "grinqh":
        reader.problem(
            f"weights already quantized by {quantization.get('quant_method', 'an unnamed method')} "
            "(use the unquantized checkpoint)"
        )
