"""Writes a checkpoint as safetensors files, and reads these back. All bits stay the same.

The exchange form is a directory in Hugging Face's layout: ``config.json`` with its ``quantization_config``,
the tokenizer's files, and a tensor for each leaf of the checkpoint, such as ``layers.0.down.planes``.
"""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from grinqh_jax.checkpoint import QuantizationConfig, Writer, load
from grinqh_jax.checkpoint.checksums import file_checksum
from grinqh_jax.checkpoint.reader import read_description
from grinqh_jax.companions import companion_path, find_companions
from grinqh_jax.errors import CheckpointError
from grinqh_jax.json_files import read_object
from grinqh_jax.model.decoder import checkpoint_leaves

SHARD_BYTES = 4 << 30
"""Most bytes of a file, unless one tensor has more."""

INDEX = "model.safetensors.index.json"
"""File that names the file of each tensor, as transformers writes it."""


def write_safetensors(model: Path, out: Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes a checkpoint as safetensors files. Memory holds the whole model.

    Args:
      model: GRINQH checkpoint of any version; the files have the present one.
      out: Directory to make.
      shard_bytes: Most bytes of a file.

    Returns:
      ``out``.

    Raises:
      CheckpointError: ``model`` is no intact checkpoint, or ``out`` exists.
    """
    hf_config, quantization = read_description(model)
    leaves = dict(sorted(checkpoint_leaves(load(model).model).items()))
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise CheckpointError(f"{out} exists; choose another directory or remove it") from None
    shards = list(_shards(leaves, shard_bytes))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, out / name, metadata={"format": "grinqh"})
    total = sum(leaf.nbytes for leaf in leaves.values())
    weight_map = {leaf: name for name, shard in zip(names, shards, strict=True) for leaf in shard}
    _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in find_companions(model):
        shutil.copyfile(file, companion_path(file, out))
    _write_json(out / "config.json", hf_config | {"quantization_config": quantization.to_json()})
    return out


def read_safetensors(exported: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Writes the checkpoint of safetensors files that ``write_safetensors`` has written.

    Args:
      exported: Directory of the files.
      out: Directory to make.
      overwrite: See ``Writer``.

    Returns:
      The absolute path of ``out``.

    Raises:
      CheckpointError: A file is missing or damaged, the tensors do not fit the configuration, or ``out``
        exists.
    """
    hf_config = read_object(exported / "config.json")
    quantization = QuantizationConfig.from_json(hf_config.pop("quantization_config", None))
    leaves = sorted(_tensors(exported).items())
    fingerprint = f"export {file_checksum(exported / INDEX)}"
    with Writer(out, fingerprint=fingerprint, overwrite=overwrite) as writer:
        for part, group in itertools.groupby(leaves, lambda leaf: ".".join(leaf[0].split(".")[:2])):
            if part not in writer.parts:
                writer.save_part(part, unflatten_dict(dict(group), sep="."))
        written = writer.finalize(hf_config, quantization, find_companions(exported))
    load(written)  # Verifies that the tensors are those of the configuration.
    return written


def _shards(leaves: Mapping[str, jax.Array], most: int) -> Iterator[dict[str, jax.Array]]:
    """Yields the leaves in groups of up to ``most`` bytes."""
    shard: dict[str, jax.Array] = {}
    for name, leaf in leaves.items():
        if shard and sum(other.nbytes for other in shard.values()) + leaf.nbytes > most:
            yield shard
            shard = {}
        shard[name] = leaf
    yield shard


def _tensors(exported: Path) -> dict[str, np.ndarray]:
    """Returns all tensors that the index names."""
    weight_map = read_object(exported / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{exported / INDEX} has no weight_map; export the checkpoint again")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise CheckpointError(f"{exported / INDEX} names {name!r}, which is no file of its directory")
        try:
            with safe_open(exported / name, framework="flax") as file:
                tensors |= {leaf: np.asarray(file.get_tensor(leaf)) for leaf in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{exported / name}: {error}; copy it again") from None
    if missing := sorted(set(weight_map) ^ set(tensors)):
        raise CheckpointError(f"{exported}: index and files differ in {missing[0]}; export again")
    return tensors


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
