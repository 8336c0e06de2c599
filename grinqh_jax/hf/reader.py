"""Reads Hugging Face checkpoints tensor by tensor or by blocks of rows, in bounded memory."""

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

from grinqh_jax.companions import COMPANIONS, find_companions
from grinqh_jax.errors import CheckpointError, GrinqhWarning, UnsupportedModelError
from grinqh_jax.hf import params
from grinqh_jax.json_files import read_object
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.families.family import EMBEDDING, LM_HEAD

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("BF16", "F16", "F32", "F64")
"""Dtypes of weights that are read, in the spelling of safetensors."""

HUB_PATTERNS = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"),
    *("state/*", "orbax.checkpoint", "_CHECKPOINT_METADATA"),  # GRINQH checkpoints
)
"""Files to download for a hub id. ``.bin`` files are pickles and are left out."""

Rows = slice | Int[np.ndarray, "rows"]
"""Rows of a tensor to read: a range, or indices. Each run of consecutive indices is one read."""

_ROWS_COMPARED = 1 << 12
"""Number of rows of embedding and head that are compared at once, which bounds the memory."""


@dataclasses.dataclass(frozen=True)
class HFCheckpoint:
    """A checkpoint whose files are readable and whose tensors have the shapes that ``config`` needs.

    Attributes:
      directory: Directory of the checkpoint.
      hf_config: Parsed ``config.json``; ``tie_word_embeddings`` is false if embedding and head differ.
      config: Configuration of the model.
      files: File of each tensor, by canonical name (the name in transformers).
      stored_names: Name of each tensor in its file, by canonical name.
    """

    directory: Path
    hf_config: dict
    config: ModelConfig
    files: dict[str, Path]
    stored_names: dict[str, str]

    @property
    def companions(self) -> list[Path]:
        """Paths of the files beside configuration and weights, such as those of the tokenizer."""
        return find_companions(self.directory)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by our dotted name.

        Kernels are ``[in, out]``, those of experts ``[experts, in, out]``.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for key, tensors in params.sources(self.config).items():
            if params.is_of_experts(self.config, key):
                tensors = tensors[: params.tensors_of_expert(self.config, key)]
                rows = sum(tensor.shape[0] for tensor in tensors)
                shapes[key] = (self.config.num_experts, tensors[0].shape[1], rows)
                continue
            rows, trailing = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1:]
            shapes[key] = (*trailing, rows) if params.is_kernel(key) else (rows, *trailing)
        return shapes

    def read(self, key: str, rows: Rows = slice(None)) -> np.ndarray:
        """Reads a parameter as ``params.from_tensors`` makes it; a kernel is ``[in, out]``.

        Args:
          key: Our dotted name of the parameter, such as ``layers.0.qkv.kernel``.
          rows: Stored rows to read: outputs of a kernel, or tokens of the embedding. Only for parameters made
            of one tensor, such as the embedding and the head, which are read in blocks; and for kernels of
            experts, where it is a range of experts.

        Raises:
          CheckpointError: The file vanished or changed since the checkpoint was opened.
        """
        if params.is_of_experts(self.config, key):
            assert isinstance(rows, slice), "experts are read in ranges"
            return self._read_experts(key, range(*rows.indices(self.config.num_experts)))
        tensors = [self.read_tensor(source.name, rows) for source in params.sources(self.config)[key]]
        return params.from_tensors(self.config, key, tensors)

    def _read_experts(self, key: str, experts: range) -> np.ndarray:
        """Reads the kernels ``[experts, in, out]`` of some experts, one after another."""
        sources, parts = params.sources(self.config)[key], params.tensors_of_expert(self.config, key)
        kernels = None
        for i, expert in enumerate(experts):
            tensors = [self.read_tensor(s.name) for s in sources[expert * parts : (expert + 1) * parts]]
            kernel = params.from_tensors(self.config, key, tensors)[0]
            if kernels is None:
                kernels = np.empty((len(experts), *kernel.shape), kernel.dtype)
            kernels[i] = kernel
        assert kernels is not None, "at least one expert is read"
        return kernels

    def read_tensor(self, name: str, rows: Rows = slice(None)) -> np.ndarray:
        """Reads a tensor by its canonical name. Raises CheckpointError as ``read`` does."""
        # The file is opened for each read, because the pages of a file that stays mapped count as memory of
        # the process.
        path = self.files[name]
        try:
            with safe_open(path, "numpy") as file:
                stored = file.get_slice(self.stored_names[name])
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
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
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
    files = {name: survey.files[stored] for name, stored in survey.stored_names.items()}
    return _resolve_tie(HFCheckpoint(directory, hf_config, config, files, survey.stored_names))


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the configuration and the headers of a directory say, and everything that is wrong with them.

    Attributes:
      directory: The directory.
      hf_config: Parsed ``config.json``; None if it cannot be read.
      config: Configuration of the model; None if ``hf_config`` is None or there are ``config_problems``.
      config_problems: Options of the configuration that are missing, malformed or not implemented.
      files: File of each tensor, by stored name.
      tensors: Dtype, in safetensors' spelling, and shape of each tensor, by stored name.
      stored_names: Stored name of each tensor, by canonical name; empty without a configuration.
      problems: Files that cannot be read, and tensors that do not match the configuration.
    """

    directory: Path
    hf_config: dict | None
    config: ModelConfig | None
    config_problems: list[str]
    files: dict[str, Path]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    stored_names: dict[str, str]
    problems: list[str]


def survey_checkpoint(directory: Path) -> Survey:
    """Reads the configuration of a directory and the headers of its files, and no weights."""
    problems: list[str] = []
    hf_config = _read_object(directory / "config.json", problems)
    index = _read_object(directory / INDEX, problems) if (directory / INDEX).exists() else None
    files_of_index = _files_of_index(index, problems)
    for name in COMPANIONS:
        if name.endswith(".json") and (directory / name).exists():
            _read_object(directory / name, problems)
    paths = _weight_files(directory, files_of_index, problems)
    files, tensors, broken = _scan(paths, problems)
    config, config_problems = None, []
    if hf_config is not None:
        reader, config = ModelConfig.read(hf_config)
        config_problems = reader.problems
        config = None if config_problems else config
    # Only an index tells which tensors a broken file should hold. Where that is unknown, every tensor of the
    # file would be reported as missing.
    all_names_known = bool(files_of_index) or (index is None and not broken)
    stored_names: dict[str, str] = {}
    if config is not None and files and all_names_known:
        in_broken_files = [name for name, file in files_of_index.items() if directory / file in broken]
        unreadable = frozenset(params.canonical_names(config, in_broken_files).values())
        stored_names = _stored_names(config, files, problems)
        shapes = {name: tensors[stored][1] for name, stored in stored_names.items()}
        problems += params.mismatches(config, shapes, unreadable)
    return Survey(directory, hf_config, config, config_problems, files, tensors, stored_names, problems)


def _stored_names(config: ModelConfig, files: dict[str, Path], problems: list[str]) -> dict[str, str]:
    """Returns the stored name of each tensor, by canonical name."""
    stored_names: dict[str, str] = {}
    for stored, name in params.canonical_names(config, files).items():
        if name in stored_names:
            problems.append(f"tensors {stored_names[name]} and {stored} are the same parameter")
        stored_names[name] = stored
    return stored_names


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


def _read_object(path: Path, problems: list[str]) -> dict | None:
    """Returns a parsed JSON file, or None and adds to ``problems``."""
    try:
        return read_object(path)
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _files_of_index(index: dict | None, problems: list[str]) -> dict[str, str]:
    """Returns the file name of each tensor in the index; empty without an index."""
    if index is None:
        return {}
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        problems.append(f"{INDEX} has no weight_map")
        return {}
    outside = sorted(
        {str(file) for file in files.values() if not isinstance(file, str) or Path(file).name != file}
    )
    if outside:
        problems.append(f"{INDEX} names files outside the directory: {', '.join(outside)}")
        return {}
    return files


def _weight_files(directory: Path, files_of_index: dict[str, str], problems: list[str]) -> list[Path]:
    """Returns the safetensors files to read; those of the index if there is one."""
    if files_of_index:
        return [directory / name for name in sorted(set(files_of_index.values()))]
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    paths = sorted(directory.glob("*.safetensors"))
    if not paths and list(directory.glob("*.bin")):
        problems.append(
            "the weights are pickled .bin files, which can run code when read and are refused; load them with"
            " transformers and save_pretrained(..., safe_serialization=True)"
        )
    elif not paths:
        problems.append("there are no .safetensors files")
    return paths


def _scan(
    paths: list[Path], problems: list[str]
) -> tuple[dict[str, Path], dict[str, tuple[str, tuple[int, ...]]], set[Path]]:
    """Reads the headers of files.

    Returns:
      ``(files, tensors, broken)``: file, and dtype and shape, of each stored name; the broken files.
    """
    files: dict[str, Path] = {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    broken = set()
    for path in paths:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    header = file.get_slice(name)
                    if name in files:
                        problems.append(f"tensor {name} is in both {files[name].name} and {path.name}")
                    dtype = header.get_dtype()
                    if dtype not in DTYPES:
                        problems.append(
                            f"tensor {name} has dtype {dtype}, expected one of {', '.join(DTYPES)}"
                        )
                    files[name], tensors[name] = path, (dtype, tuple(header.get_shape()))
        except FileNotFoundError:
            problems.append(f"{path.name} is missing")
            broken.add(path)
        except (OSError, SafetensorError) as error:
            problems.append(f"{path.name} is truncated or corrupt ({error}), download it again")
            broken.add(path)
    return files, tensors, broken
