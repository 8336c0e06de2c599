"""Reads the configuration of a checkpoint and the headers of its files, and names all that is wrong."""

import dataclasses
from pathlib import Path

from safetensors import SafetensorError, safe_open

from grinqh_jax.companions import COMPANIONS
from grinqh_jax.errors import CheckpointError
from grinqh_jax.hf.matching import canonical_names, mismatches
from grinqh_jax.hf.stored_together import Place, stored_forms
from grinqh_jax.json_files import read_object
from grinqh_jax.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("BF16", "F16", "F32", "F64")
"""Dtypes of weights that are read, in the spelling of safetensors."""

BYTES = "U8"
"""Dtype of the blocks and scales of ``mxfp4``, whose names end with ``_blocks`` and ``_scales``."""


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
      parts: See ``HFCheckpoint``.
      problems: Files that cannot be read, and tensors that do not match the configuration.
    """

    directory: Path
    hf_config: dict | None
    config: ModelConfig | None
    config_problems: list[str]
    files: dict[str, Path]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    stored_names: dict[str, str]
    parts: dict[str, Place]
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
    parts: dict[str, Place] = {}
    if config is not None and files and all_names_known:
        in_broken_files = [name for name, file in files_of_index.items() if directory / file in broken]
        unreadable = frozenset(canonical_names(config, in_broken_files).values())
        stored_names = _stored_names(config, files, problems)
        shapes = {name: tensors[stored][1] for name, stored in stored_names.items()}
        parts = _parts(config, stored_names, shapes, problems)
        problems += mismatches(config, shapes, unreadable)
    return Survey(
        directory, hf_config, config, config_problems, files, tensors, stored_names, parts, problems
    )


def _parts(
    config: ModelConfig,
    stored_names: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    problems: list[str],
) -> dict[str, Place]:
    """Replaces tensors that hold those of several experts of a layer by these; returns the place of each.

    A tensor of another shape stays, and so it is reported as one that is not part of the model.
    """
    parts: dict[str, Place] = {}
    for name, form in stored_forms(config).items():
        if shapes.get(name) != form.shape:
            continue
        stored = stored_names.pop(name)
        del shapes[name]
        if form.scales is not None:
            shape = shapes.pop(form.scales, None)
            if shape != form.shape[:-1]:
                found = "is missing" if shape is None else f"has shape {list(shape)}"
                problems.append(f"tensor {form.scales} {found}, {name} asks for {list(form.shape[:-1])}")
        if repeated := next((part for part in form.parts if part in stored_names), None):
            problems.append(f"tensors {stored_names[repeated]} and {stored} are the same parameter")
        parts |= form.parts
        stored_names |= dict.fromkeys(form.parts, stored)
        shapes |= {tensor: part.shape for tensor, part in form.parts.items()}
    return parts


def _stored_names(config: ModelConfig, files: dict[str, Path], problems: list[str]) -> dict[str, str]:
    """Returns the stored name of each tensor, by canonical name."""
    stored_names: dict[str, str] = {}
    for stored, name in canonical_names(config, files).items():
        if name in stored_names:
            problems.append(f"tensors {stored_names[name]} and {stored} are the same parameter")
        stored_names[name] = stored
    return stored_names


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
                    packed = name.endswith(("_blocks", "_scales")) and dtype == BYTES
                    if dtype not in DTYPES and not packed:
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
