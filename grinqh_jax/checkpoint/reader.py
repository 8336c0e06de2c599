"""Loading a checkpoint: everything is compared with its description before any of it is used."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from flax import traverse_util

from grinqh_jax.checkpoint.manifest import Manifest
from grinqh_jax.checkpoint.quantization import QuantizationConfig
from grinqh_jax.checkpoint.values import value_problems
from grinqh_jax.checkpoint.writer import CONVERSION
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.json_files import read_object
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, abstract_tree

CONFIG = "config.json"
READ_AHEAD_BYTES = 1 << 28
"""Bytes that may be between disk and device while loading, unless one array is larger than half of it."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
      config: of the model.
      quantization: how it is stored, and the targets that it was calibrated for.
      model: the decoder with its arrays.
      directory: where it came from; the tokenizer's files are there.
    """

    config: ModelConfig
    quantization: QuantizationConfig
    model: Decoder
    directory: Path


def load(
    path: str | Path,
    compute_dtype: Any = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Loaded:
    """Loads a GRINQH checkpoint.

    Every file is compared with ``manifest.json`` before Orbax opens it (damaged metadata could otherwise
    make it fail in any way, or wait for ever), and every array after; then values are checked that would make
    the answers wrong (``values``). Peak memory is that of the model: each array is read straight to where it
    stays.

    Args:
      path: the checkpoint's directory.
      compute_dtype: of hidden states and matrix products; by default float32 on a CPU (where bfloat16
        is emulated) and bfloat16 elsewhere.
      shardings: where leaves go, by dotted name (``layers.0.qkv.planes``); the others go to the first
        device. Leaves that this process does not hold completely are checked as files only.

    Raises:
      CheckpointError: the directory is not a GRINQH checkpoint (the message says what it is and what to
        do), was written by another version, or does not agree with its description; all
        differences are named.
      UnsupportedModelError: the model is one that this version cannot run.
    """
    directory = Path(path)
    hf_config = _read_config(directory)
    try:
        quantization = QuantizationConfig.from_json(hf_config["quantization_config"])
        manifest = Manifest.read(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    file_problems = manifest.file_problems(directory)
    problems = [f"{name} {problem}" for name, problem in file_problems.items()]
    if CONFIG not in file_problems:
        config = ModelConfig.from_hf(hf_config)
        wished = abstract_tree(config, quantization.max_bits, len(quantization.targets))
        problems += manifest.tree_problems(wished)
    if problems:
        raise _damaged(directory, problems)
    arrays = _restore(directory, traverse_util.flatten_dict(wished, sep="."), shardings or {})
    if problems := manifest.array_problems(arrays) + value_problems(arrays):
        raise _damaged(directory, problems)
    if compute_dtype is None:
        compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = Decoder.from_tree(config, traverse_util.unflatten_dict(arrays, sep="."), compute_dtype)
    return Loaded(config, quantization, model, directory)


def _read_config(directory: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of what is, or says that it is, a quantized checkpoint.

    Raises:
      CheckpointError: it is anything else; the message says what, and what to do about it.
    """
    unfinished = directory.with_name(directory.name + ".partial")
    if not directory.exists():
        if unfinished.is_dir():
            raise CheckpointError(f"{directory}: its conversion is unfinished; run the same command again")
        raise CheckpointError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; name the one that holds {CONFIG}")
    if (directory / CONVERSION).exists():
        raise CheckpointError(f"{directory} is an unfinished conversion; run the same command again")
    weights = sorted({file.suffix for file in directory.glob("*") if file.suffix in (".safetensors", ".bin")})
    if not (directory / CONFIG).exists():
        raise CheckpointError(f"{directory}: {CONFIG} is missing; this is not a checkpoint, or part of one")
    config = read_object(directory / CONFIG)
    if config.get("quantization_config") is not None:
        return config
    convert = f"python -m checkpoints_tools.convert --model {directory} --out OUT"
    if ".safetensors" in weights:
        raise CheckpointError(f"{directory} is an unquantized Hugging Face checkpoint; convert it: {convert}")
    if ".bin" in weights:
        raise CheckpointError(
            f"{directory} holds pickled .bin weights, which can run code when read and are refused; load "
            f"them with transformers, save_pretrained(...) as safetensors, then convert: {convert}"
        )
    raise CheckpointError(
        f"{directory}: {CONFIG} has no quantization_config; convert the original model again"
    )


def _restore(
    directory: Path,
    wished: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    if unknown := sorted(shardings.keys() - wished.keys()):
        raise UsageError(f"shardings for leaves that the model does not have: {', '.join(unknown)}")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings.get(name, here))
        for name, leaf in wished.items()
    }
    context = ocp.Context()
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in wished.values())
    context.memory.read_concurrent_bytes = max(READ_AHEAD_BYTES, 2 * largest)
    try:
        with context:
            tree = ocp.load(directory.absolute(), traverse_util.unflatten_dict(abstract, sep="."))
    except (
        Exception
    ) as error:  # whatever Orbax and TensorStore raise, the files are what they were written as
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: Orbax cannot restore state/: {reason:.300}") from error
    return traverse_util.flatten_dict(tree, sep=".")


def _damaged(directory: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{directory} is damaged (copy or download it again, or convert the model again): "
        + "; ".join(problems)
    )
