"""Reads Hugging Face checkpoints tensor by tensor, or by blocks of rows, with bounded memory."""

import dataclasses
import os
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy, hence safetensors, the dtype bfloat16)
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from grinqh_jax.errors import CheckpointError
from grinqh_jax.hf import params
from grinqh_jax.json_files import read_object
from grinqh_jax.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("BF16", "F16", "F32", "F64")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that belong to a model beside its config and weights: tokenizer, chat template, stop tokens."""

HUB_PATTERNS = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"),
    *("state/*", "orbax.checkpoint", "_CHECKPOINT_METADATA"),  # of a GRINQH checkpoint
)
"""Files that a hub id downloads: unquantized checkpoints and GRINQH ones, not ``.bin`` pickles."""

Rows = slice | Int[np.ndarray, "rows"]
"""Some of a tensor's rows: a range, or their numbers, which read fastest where they ascend without gaps."""


@dataclasses.dataclass(frozen=True)
class HFCheckpoint:
    """An opened checkpoint: every tensor of the model is there, in a readable file, in its shape.

    Attributes:
      directory: where it lies.
      hf_config: ``config.json`` as it is.
      config: what the decoder takes from it.
      files: tensor name -> file.
    """

    directory: Path
    hf_config: dict
    config: ModelConfig
    files: dict[str, Path]

    @property
    def companions(self) -> list[Path]:
        """Those of ``COMPANIONS`` that the checkpoint has."""
        return [path for name in COMPANIONS if (path := self.directory / name).is_file()]

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Our dotted key of every parameter -> shape, kernels ``[in, out]``."""
        shapes = {}
        for key, parts in params.sources(self.config).items():
            rows = sum(part.shape[0] for part in parts)
            shapes[key] = (parts[0].shape[1], rows) if params.is_kernel(key) else (rows, *parts[0].shape[1:])
        return shapes

    def read(self, key: str, rows: Rows = slice(None)) -> np.ndarray:
        """One parameter in its stored dtype: a kernel as ``[in, out]`` (query, key, value concatenated).

        Args:
          key: ours, such as ``layers.0.qkv.kernel``.
          rows: rows as stored, that is outputs of a kernel or tokens of the embedding; only for
            parameters made of one tensor (the embedding and the head are read in blocks this way).

        Raises:
          CheckpointError: the file vanished or changed since it was opened.
        """
        parts = [self._read_tensor(part.name, rows) for part in params.sources(self.config)[key]]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return value.T if params.is_kernel(key) else value

    def _read_tensor(self, name: str, rows: Rows) -> np.ndarray:
        # Opened anew each time: the pages of a file that stays mapped count as our memory for good.
        path = self.files[name]
        try:
            with safe_open(path, "numpy") as file:
                stored = file.get_slice(name)
                if isinstance(rows, slice):
                    return stored[rows]
                runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
                return np.concatenate([stored[int(run[0]) : int(run[-1]) + 1] for run in runs])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read tensor {name}: {error}") from None


def resolve(model: str | os.PathLike[str]) -> Path:
    """The directory of a model: ``model`` itself, or a snapshot of that Hugging Face hub id.

    Raises:
      CheckpointError: no such directory, or the hub does not have it, or cannot be reached and the
        local cache does not have it either.
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
    """Opens a directory or hub id and checks it whole, without reading the weights.

    Raises:
      CheckpointError: one message that names every missing, extra, misshapen or mistyped tensor and
        every missing, truncated or corrupt file.
      UnsupportedModelError: the config asks for what the decoder does not have.
    """
    directory = resolve(model)
    problems: list[str] = []
    hf_config = _read_object(directory / "config.json", problems)
    match hf_config:
        case {"quantization_config": {"quant_method": "grinqh"}}:
            raise CheckpointError(
                f"{directory} is a GRINQH checkpoint already; name the one it was made from"
            )
    index = _read_object(directory / INDEX, problems) if (directory / INDEX).exists() else None
    placed = _placed_tensors(index, problems)
    for name in COMPANIONS:
        if name.endswith(".json") and (directory / name).exists():
            _read_object(directory / name, problems)
    paths = _weight_files(directory, placed, problems)
    files, shapes, broken = _scan(paths, problems)
    config = ModelConfig.from_hf(hf_config) if hf_config is not None else None
    unlisted = bool(broken) and not placed  # a broken file without an index: its tensors are unknown
    if config is not None and files and not unlisted and (index is None or placed):
        unreadable = frozenset(name for name, file in placed.items() if directory / file in broken)
        problems += params.mismatches(config, shapes, unreadable)
    if config is None or problems:
        raise CheckpointError(f"{directory}: " + "; ".join(problems))
    return HFCheckpoint(directory, hf_config, config, files)


def _read_object(path: Path, problems: list[str]) -> dict | None:
    try:
        return read_object(path)
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _placed_tensors(index: dict | None, problems: list[str]) -> dict[str, str]:
    """Tensor name -> file name, as the index says; empty without one."""
    if index is None:
        return {}
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        problems.append(f"{INDEX} has no weight_map")
        return {}
    outside = sorted(
        {str(file) for file in placed.values() if not isinstance(file, str) or Path(file).name != file}
    )
    if outside:
        problems.append(f"{INDEX} names files outside the directory: {', '.join(outside)}")
        return {}
    return placed


def _weight_files(directory: Path, placed: dict[str, str], problems: list[str]) -> list[Path]:
    if placed:
        return [directory / name for name in sorted(set(placed.values()))]
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
) -> tuple[dict[str, Path], dict[str, tuple[int, ...]], set[Path]]:
    """Reads the headers: tensor name -> file, -> shape, and the files that could not be read."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    broken = set()
    for path in paths:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    header = file.get_slice(name)
                    if name in files:
                        problems.append(f"tensor {name} is in both {files[name].name} and {path.name}")
                    if header.get_dtype() not in DTYPES:
                        dtype = header.get_dtype()
                        problems.append(
                            f"tensor {name} has dtype {dtype}, expected one of {', '.join(DTYPES)}"
                        )
                    files[name], shapes[name] = path, tuple(header.get_shape())
        except FileNotFoundError:
            problems.append(f"{path.name} is missing")
            broken.add(path)
        except (OSError, SafetensorError) as error:
            problems.append(f"{path.name} is truncated or corrupt ({error})")
            broken.add(path)
    return files, shapes, broken
