"""Reads Hugging Face checkpoints tensor by tensor or by blocks of rows, in bounded memory."""

import contextlib
import dataclasses
import os
import warnings
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy, hence safetensors, the dtype bfloat16)
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from grinqh_jax.companions import find_companions
from grinqh_jax.errors import CheckpointError, GrinqhWarning, UnsupportedModelError
from grinqh_jax.hf import params
from grinqh_jax.hf.stored_together import Place
from grinqh_jax.hf.survey import survey_checkpoint
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.families.family import EMBEDDING, LM_HEAD

HUB_PATTERNS = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"),
    *("state/*", "orbax.checkpoint", "_CHECKPOINT_METADATA"),  # GRINQH checkpoints
)
"""Files to download for a hub id. ``.bin`` files are pickles and are left out."""

HUB_IGNORED = ("original/*", "metal/*")
"""Folders of gpt-oss with copies of the weights in other formats."""

Rows = slice | Int[np.ndarray, "rows"]
"""Rows of a tensor to read: a range, or indices. Each run of consecutive indices is one read."""

_ROWS_COMPARED = 1 << 12
"""Number of rows of embedding and head that are compared at once, which bounds the memory."""


@dataclasses.dataclass(frozen=True)
class HFCheckpoint:
    """A checkpoint whose files are readable and whose tensors have the shapes that ``config`` needs.

    Attributes:
      directory: Directory of the checkpoint.
      hf_config: Parsed ``config.json`` without ``quantization_config``, because weights are read dequantized;
        ``tie_word_embeddings`` is false if embedding and head differ.
      config: Configuration of the model.
      files: File of each tensor, by canonical name (the name in transformers).
      stored_names: Name of each tensor in its file, by canonical name.
      parts: Place of each tensor in the stored one, by canonical name; only of experts that are stored
        together. The names of their scales are in ``files`` and ``stored_names``, too.
    """

    directory: Path
    hf_config: dict
    config: ModelConfig
    files: dict[str, Path]
    stored_names: dict[str, str]
    parts: dict[str, Place] = dataclasses.field(default_factory=dict, kw_only=True)

    @property
    def companions(self) -> list[Path]:
        """Paths of the files beside configuration and weights, such as those of the tokenizer."""
        return find_companions(self.directory)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by our dotted name.

        Kernels are ``[in, out]``. Parameters of experts have an axis of experts in front.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for key, tensors in params.sources(self.config).items():
            if params.is_of_experts(self.config, key):
                tensors = tensors[: params.tensors_of_expert(self.config, key)]
            rows, trailing = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1:]
            experts = (self.config.num_experts,) if params.is_of_experts(self.config, key) else ()
            one = (*trailing, rows) if params.is_kernel(key) else (rows, *trailing)
            shapes[key] = *experts, *one
        return shapes

    def read(self, key: str, rows: Rows = slice(None)) -> np.ndarray:
        """Reads a parameter as ``params.from_tensors`` makes it; a kernel is ``[in, out]``.

        Args:
          key: Our dotted name of the parameter, such as ``layers.0.qkv.kernel``.
          rows: Stored rows to read: outputs of a kernel, or tokens of the embedding. Only for parameters made
            of one tensor, such as the embedding and the head, which are read in blocks; and for kernels and
            biases of experts, where it is a range of experts.

        Raises:
          CheckpointError: The file vanished or changed since the checkpoint was opened.
        """
        if params.is_of_experts(self.config, key):
            assert isinstance(rows, slice), "experts are read in ranges"
            return self._read_experts(key, range(*rows.indices(self.config.num_experts)))
        tensors = [self.read_tensor(source.name, rows) for source in params.sources(self.config)[key]]
        return params.from_tensors(self.config, key, tensors)

    def _read_experts(self, key: str, experts: range) -> np.ndarray:
        """Reads the kernels ``[experts, in, out]`` or biases of some experts, one after another."""
        sources, parts = params.sources(self.config)[key], params.tensors_of_expert(self.config, key)
        stack = None
        for i, expert in enumerate(experts):
            tensors = [self.read_tensor(s.name) for s in sources[expert * parts : (expert + 1) * parts]]
            # Kernels stay transposed in memory: numpy transposes ten times as slowly as ``jnp.asarray``.
            stored = params.from_tensors(self.config, key, tensors)[0].T
            if stack is None:
                stack = np.empty((len(experts), *stored.shape), stored.dtype)
            stack[i] = stored
        assert stack is not None, "at least one expert is read"
        return stack.swapaxes(-1, -2) if params.is_kernel(key) else stack

    def read_tensor(self, name: str, rows: Rows = slice(None)) -> np.ndarray:
        """Reads a tensor by its canonical name. Raises CheckpointError as ``read`` does."""
        # The file is opened for each read, because the pages of a file that stays mapped count as memory of
        # the process.
        path, part = self.files[name], self.parts.get(name)
        try:
            with contextlib.ExitStack() as files:
                file = files.enter_context(safe_open(path, "numpy"))
                stored = file.get_slice(self.stored_names[name])
                if part is not None and part.scales is not None:
                    path = self.files[part.scales]
                    other = files.enter_context(safe_open(path, "numpy"))
                    return part.take(stored, other.get_slice(self.stored_names[part.scales]))
                if part is not None:
                    return part.take(stored)
                if isinstance(rows, slice):
                    return stored[rows]
                runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
                return np.concatenate([stored[int(run[0]) : int(run[-1]) + 1] for run in runs])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read tensor {name}: {error}") from None


def resolve(model: str | os.PathLike[str]) -> Path:
    """Returns the directory of a model: ``model`` itself, or a snapshot of that Hugging Face hub id.

    Raises:
      CheckpointError: There is no such directory, and neither the hub nor its local cache has such a model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"{name}: not a directory; give a checkpoint's directory or a hub id such as Qwen/Qwen3-0.6B"
        )
    try:
        patterns, ignored = list(HUB_PATTERNS), list(HUB_IGNORED)
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the local cache does not hold it; download it first"
    except HFValidationError:
        reason = "neither a directory nor a valid hub id"
    except HfHubHTTPError as error:
        reason = "the hub answers: " + " ".join(str(error).split())
    raise CheckpointError(f"{name}: {reason}")


def open_checkpoint(model: str | os.PathLike[str]) -> HFCheckpoint:
    """Opens a checkpoint (directory or hub id) and checks everything but the values of the weights.

    Raises:
      CheckpointError: Tensors are missing, unknown, or have another shape or dtype than expected, or files
        are missing, truncated or corrupt. One message names all of them.
      UnsupportedModelError: The configuration needs something that the decoder does not implement.
    """
    survey = survey_checkpoint(resolve(model))
    directory, hf_config, config = survey.directory, survey.hf_config, survey.config
    match hf_config:
        case {"quantization_config": {"quant_method": "grinqh"}}:
            raise CheckpointError(
                f"{directory} is a GRINQH checkpoint already; name the one it was made from"
            )
    if survey.config_problems:
        raise UnsupportedModelError("unsupported model configuration: " + "; ".join(survey.config_problems))
    if config is None or hf_config is None or survey.problems:
        raise CheckpointError(f"{directory}: " + "; ".join(survey.problems))
    hf_config = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    files = {name: survey.files[stored] for name, stored in survey.stored_names.items()}
    checkpoint = HFCheckpoint(directory, hf_config, config, files, survey.stored_names, parts=survey.parts)
    return _resolve_tie(checkpoint)


def _resolve_tie(checkpoint: HFCheckpoint) -> HFCheckpoint:
    """Unties embedding and head if both are stored and differ, as transformers 5 does, with a warning."""
    if not checkpoint.config.tie_word_embeddings or LM_HEAD not in checkpoint.files:
        return checkpoint
    if EMBEDDING not in checkpoint.files:  # the head is the embedding
        return dataclasses.replace(
            checkpoint,
            files=checkpoint.files | {EMBEDDING: checkpoint.files[LM_HEAD]},
            stored_names=checkpoint.stored_names | {EMBEDDING: checkpoint.stored_names[LM_HEAD]},
        )
    if _equal(checkpoint, EMBEDDING, LM_HEAD):
        return checkpoint
    warnings.warn(
        f"{checkpoint.directory}: config.json ties the embedding and lm_head.weight, but they differ; "
        "both are used (tie_word_embeddings: false in config.json avoids this warning)",
        GrinqhWarning,
        stacklevel=3,
    )
    return dataclasses.replace(
        checkpoint,
        hf_config=checkpoint.hf_config | {"tie_word_embeddings": False},
        config=dataclasses.replace(checkpoint.config, tie_word_embeddings=False),
    )


def _equal(checkpoint: HFCheckpoint, first: str, second: str) -> bool:
    """Whether two tensors with one row for each token have the same values."""
    rows = checkpoint.config.vocab_size
    blocks = [slice(i, min(i + _ROWS_COMPARED, rows)) for i in range(0, rows, _ROWS_COMPARED)]
    return all(
        np.array_equal(checkpoint.read_tensor(first, block), checkpoint.read_tensor(second, block))
        for block in blocks
    )
