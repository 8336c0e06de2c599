"""The files of a model without its weights, which suffice to refuse a request before loading the weights."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grinqh_jax import checkpoint, hf
from grinqh_jax.checkpoint.reader import read_description
from grinqh_jax.decoding.bits import Bits, wanted_bits
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.hf.mxfp4 import METHOD
from grinqh_jax.json_files import read_json
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.text.tokenizer import Tokenizer

_GGUF = ".gguf"


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The small files of a GRINQH checkpoint, or of an unquantized Hugging Face one.

    Attributes:
      directory: The model's directory.
      hf_config: Parsed ``config.json``.
      quantization: Entry of ``config.json`` for a GRINQH checkpoint; None for an unquantized one.
      tokenizer: The model's tokenizer.
      defaults: The model's special tokens and sampling defaults.
    """

    directory: Path
    hf_config: dict[str, Any]
    quantization: checkpoint.QuantizationConfig | None
    tokenizer: Tokenizer
    defaults: GenerationConfig

    @classmethod
    def open(cls, model: str | os.PathLike[str]) -> "ModelFiles":
        """Reads the small files of a directory or hub id.

        Raises:
          CheckpointError: There is no such model, or a file is missing or damaged.
        """
        directory = hf.resolve(_checked_format(model))
        config = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
        quantization_config = config.get("quantization_config") if isinstance(config, dict) else None
        # The experts of a source in MXFP4 are read dequantized.
        source = isinstance(quantization_config, dict) and quantization_config.get("quant_method") == METHOD
        quantized = quantization_config is not None and not source
        quantization = None
        if quantized or not list(directory.glob("*.safetensors")):
            config, quantization = read_description(directory)
        tokenizer, defaults = Tokenizer.load(directory), GenerationConfig.load(directory)
        return cls(directory, config, quantization, tokenizer, defaults)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Configuration of the model. Raises UnsupportedModelError if it needs something unimplemented."""
        return ModelConfig.from_hf(self.hf_config)

    @property
    def targets(self) -> tuple[float, ...] | None:
        """Ascending mean bits of the threshold tables; None for an unquantized model."""
        return None if self.quantization is None else self.quantization.targets

    def check(
        self, bits: Sequence[Bits | None], max_context: int | None = None, prompt_tokens: int = 1
    ) -> None:
        """Checks a request against the model.

        Args:
          bits: Settings of the dial.
          max_context: Most tokens of prompt and text together; None for the number of positions.
          prompt_tokens: Number of tokens of the prompt.

        Raises:
          UsageError: The model does not support a setting, or the context, or the prompt does not fit.
        """
        wanted_bits(bits, self.targets, self.directory)
        context = check_context(max_context, self.config)
        if prompt_tokens >= context:
            raise prompt_too_long(prompt_tokens, context)


def check_context(max_context: int | None, config: ModelConfig) -> int:
    """Returns the number of tokens of prompt and text together, by default the number of positions.

    Raises:
      UsageError: ``max_context`` is less than 2 or more than the model has positions.
    """
    most = config.max_position_embeddings
    if max_context is not None and not 2 <= max_context <= most:
        raise UsageError(f"a context of {max_context:,} tokens: the model has positions for 2 to {most:,}")
    return max_context or most


def prompt_too_long(prompt_tokens: int, context: int) -> UsageError:
    """Returns the error for a prompt that leaves no room in the context."""
    return UsageError(
        f"the prompt has {prompt_tokens} tokens and the context holds {context}, the answer included; "
        "shorten the prompt or raise the context"
    )


def _checked_format(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Returns ``model``. Raises CheckpointError if it is a GGUF file or a directory of nothing else."""
    path = Path(model).expanduser()
    file = path
    if path.is_dir() and not (path / "config.json").exists():
        file = min(path.glob(f"*{_GGUF}"), default=path)
    if file.is_file() and (file.suffix.lower() == _GGUF or _starts_with(file, b"GGUF")):
        raise CheckpointError(
            f"{file} is a GGUF file, which must be converted first: "
            f"grinqh-jax convert --model {file} --out DIR"
        )
    return model


def _starts_with(file: Path, magic: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(magic)) == magic
    except OSError:
        return False
