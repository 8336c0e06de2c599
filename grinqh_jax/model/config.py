"""The model configuration: what a Hugging Face ``config.json`` says, checked and in one spelling."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from grinqh_jax.errors import UnsupportedModelError, UsageError

ARCHITECTURES: dict[str, Literal["llama", "qwen3"]] = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}
"""Supported ``architectures`` entries, and the ``model_type`` that each stands for."""

ROPE_TYPES = ("default", "llama3")

DEFAULT_ROPE_THETA = 10000.0
"""Base of the rotary frequencies when a configuration names none (both architectures' default)."""

QWEN3_HEAD_DIM = 128
"""Head dimension of a Qwen3 configuration that names none; Llama divides hidden size by heads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the fields after ``type`` matter to ``llama3`` only (see ``rope``)."""

    theta: float = DEFAULT_ROPE_THETA
    type: Literal["default", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and options of one decoder-only model. Hashable, hence static under ``jit``.

    ``qk_norm`` is Qwen3's RMS norm of every query and key head before the rotation.
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
        """Reads a Hugging Face configuration, in the spellings of transformers 4 and 5.

        Args:
          hf: the parsed ``config.json``. Keys that do not change the computation are ignored.

        Raises:
          UnsupportedModelError: naming, in one message, everything that is missing, malformed or not
            implemented: other architectures, mixture of experts, sliding windows, biases, other
            activations, other rotary embeddings, weights already quantized by another method.
        """
        reader = _Reader(hf)
        architecture = _architecture(reader)
        hidden_size = reader.integer("hidden_size")
        num_heads = reader.integer("num_attention_heads")
        num_kv_heads = reader.integer("num_key_value_heads", num_heads)
        own_head_dim = QWEN3_HEAD_DIM if architecture == "qwen3" else hidden_size // max(num_heads, 1)
        head_dim = reader.integer("head_dim", own_head_dim)
        if num_heads % max(num_kv_heads, 1):
            reader.problem(
                f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        if head_dim % 2:
            reader.problem(f"head_dim {head_dim} is odd")
        max_positions = reader.integer("max_position_embeddings", 2048)
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
        """Raises UsageError where one is outside the vocabulary: JAX would read another one's embedding."""
        outside = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise UsageError(
                f"token {outside} is outside the model's vocabulary of {self.vocab_size}: "
                "the tokenizer belongs to another model"
            )


class _Reader:
    """Reads values of a parsed JSON object and collects everything that is wrong with them."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; an absent or null key is the default, or a problem if there is none."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problem(f"{key} is {value!r}, expected a positive integer")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number; an absent or null key is the default."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            self.problem(f"{key} is {value!r}, expected a positive number")
            return default
        return float(value)

    def names(self, key: str) -> list[str]:
        """A list of strings, empty if absent or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.problem(f"{key} is {value!r}, expected a list of names")
            return []
        return value

    def section(self, key: str) -> "_Reader":
        """A nested object, empty if absent; its problems are this reader's problems."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.problem(f"{key} is {value!r}, expected an object")
            value = None
        nested = _Reader(value or {})
        nested.problems = self.problems
        return nested


def _architecture(reader: _Reader) -> Literal["llama", "qwen3"]:
    names = reader.names("architectures")
    model_type = reader.values.get("model_type")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names and model_type in ARCHITECTURES.values():
        return model_type
    found = f"architecture {', '.join(names)}" if names else f"model_type {model_type!r}"
    reader.problem(f"{found} (supported: {', '.join(ARCHITECTURES)})")
    return "llama"


def _rope(reader: _Reader, max_positions: int) -> RopeConfig:
    """Transformers 5 has one object ``rope_parameters``; 4 has ``rope_theta`` and ``rope_scaling``."""
    rope = reader.section("rope_parameters")
    if set(rope.values) == {"full_attention"}:  # one entry per kind of layer
        rope = rope.section("full_attention")
    scaling = rope if rope.values else reader.section("rope_scaling")
    theta = (rope if "rope_theta" in rope.values else reader).number("rope_theta", DEFAULT_ROPE_THETA)
    kind = scaling.values.get("rope_type", scaling.values.get("type")) or "default"
    for source in (reader, scaling):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            reader.problem(f"partial_rotary_factor {source.values['partial_rotary_factor']}")
    if kind not in ROPE_TYPES:
        reader.problem(f"rope type {kind!r} (supported: {', '.join(ROPE_TYPES)})")
    if kind != "llama3":
        return RopeConfig(theta=theta)
    missing = [k for k in ("factor", "low_freq_factor", "high_freq_factor") if k not in scaling.values]
    if missing:
        reader.problem(f"llama3 rope lacks {', '.join(missing)}")
    rope_config = RopeConfig(
        theta=theta,
        type="llama3",
        factor=scaling.number("factor", 1.0),
        low_freq_factor=scaling.number("low_freq_factor", 1.0),
        high_freq_factor=scaling.number("high_freq_factor", 4.0),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings", max_positions),
    )
    if rope_config.high_freq_factor <= rope_config.low_freq_factor:
        reader.problem(
            f"llama3 rope has high_freq_factor {rope_config.high_freq_factor:g} <= "
            f"low_freq_factor {rope_config.low_freq_factor:g}"
        )
    return rope_config


def _refuse_options(reader: _Reader) -> None:
    """Notes every option that would change the computation and is not implemented."""
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
    # Qwen3 states a window that it does not use; where no switch exists, a stated window is in use.
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
