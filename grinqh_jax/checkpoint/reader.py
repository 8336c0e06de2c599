"""Loads a checkpoint, and verifies all of it against its manifest before any of it is used."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import traverse_util

from grinqh_jax.checkpoint import version_1
from grinqh_jax.checkpoint.manifest import Manifest
from grinqh_jax.checkpoint.quantization import QuantizationConfig
from grinqh_jax.checkpoint.values import value_problems
from grinqh_jax.checkpoint.writer import CONVERSION
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.json_files import read_object
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, abstract_tree
from grinqh_jax.model.partition import ExchangeSetting
from grinqh_jax.sharding.cutting import cut_leaves, even_sharding
from grinqh_jax.sharding.rules import partition
from pallas_kernels.x64 import without_x64

CONFIG = "config.json"
READ_AHEAD_BYTES = 1 << 28
"""Bytes in flight between disk and device while loading. Arrays larger than half of it raise the limit."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
      config: Configuration of the model.
      quantization: Stored bits and the targets of the threshold tables.
      model: The decoder with its arrays.
      directory: The checkpoint's directory, which also holds the tokenizer's files.
    """

    config: ModelConfig
    quantization: QuantizationConfig
    model: Decoder
    directory: Path


@without_x64
def load(
    path: str | Path,
    compute_dtype: Any = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    exchange: ExchangeSetting = "auto",
) -> Loaded:
    """Loads a GRINQH checkpoint.

    Each file is compared with ``manifest.json`` before Orbax opens it, because damaged metadata could make
    Orbax fail arbitrarily or hang. Each array is compared with the manifest after it is read. Then ``values``
    checks the rules for values. Each array is read directly to its device, so peak memory is the size of the
    model. Arrays of format version 1 that the present version stores in another way are changed on the host,
    layer by layer.

    Args:
      path: The checkpoint's directory.
      compute_dtype: Dtype of hidden states and matrix products. The default is float32 on a CPU, where
        bfloat16 is emulated, and bfloat16 on other devices.
      shardings: Shardings of leaves by dotted name (``layers.0.qkv.planes``). All other leaves go to the
        first device. Of leaves of which this process holds only some shards, only the files are verified.
      mesh: Mesh to cut the model among (``sharding.rules``), without ``shardings``. Each device reads an even
        share of every large array. The devices then exchange what their parts need, one array after another,
        so that a device never holds more than its part of the model and one whole array.
      exchange: How a decode step adds up the results of the devices (``partition.ExchangeSetting``).

    Raises:
      UsageError: The mesh does not fit the model.
      CheckpointError: The directory is not a GRINQH checkpoint, was written by another version, or
        contradicts its manifest. The message names all differences and says what to do.
      UnsupportedModelError: This version cannot run the model.
    """
    directory = Path(path)
    hf_config, quantization = read_description(directory)
    try:
        manifest = Manifest.read(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    file_problems = manifest.file_problems(directory)
    problems = [f"{name} {problem}" for name, problem in file_problems.items()]
    if CONFIG not in file_problems:
        config = ModelConfig.from_hf(hf_config)
        cut = None if mesh is None else partition(config, mesh, exchange)
        tree = abstract_tree(config, quantization.max_bits, len(quantization.targets))
        stored = version_1.stored_tree(tree, hf_config["quantization_config"]["version"])
        problems += manifest.tree_problems(stored)
    if problems:
        raise _damaged(directory, problems)
    leaves, stored_leaves = (traverse_util.flatten_dict(each, sep=".") for each in (tree, stored))
    if mesh is not None:
        shardings = {name: even_sharding(leaf.shape, mesh) for name, leaf in leaves.items()}
    shardings = _all_shardings(leaves, shardings or {})
    outdated = [name for name, leaf in leaves.items() if stored_leaves[name].shape != leaf.shape]
    current = {name: leaf for name, leaf in leaves.items() if name not in outdated}
    arrays = _restore(directory, current, shardings)
    problems = manifest.array_problems(arrays) + value_problems(arrays)
    for _, names in itertools.groupby(outdated, lambda name: name.split(".")[:2]):  # Layer by layer.
        old = _restore(directory, {name: stored_leaves[name] for name in names})
        problems += manifest.array_problems(old)
        for name, array in old.items():
            arrays[name] = jax.device_put(
                version_1.upgraded(name, np.asarray(array), leaves[name]), shardings[name]
            )
    if problems:
        raise _damaged(directory, problems)
    if compute_dtype is None:
        compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if cut is not None:
        arrays = cut_leaves(config, arrays, cut)
    model = Decoder.from_tree(config, traverse_util.unflatten_dict(arrays, sep="."), compute_dtype, cut)
    return Loaded(config, quantization, model, directory)


def read_description(directory: Path) -> tuple[dict[str, Any], QuantizationConfig]:
    """Returns the parsed ``config.json`` of a GRINQH checkpoint, and its ``quantization_config``.

    Raises:
      CheckpointError: The directory is not a GRINQH checkpoint, or one of another version.
    """
    hf_config = _read_config(directory)
    try:
        return hf_config, QuantizationConfig.from_json(hf_config["quantization_config"])
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None


def _read_config(directory: Path) -> dict[str, Any]:
    """Returns the parsed ``config.json`` of a directory that claims to be a quantized checkpoint.

    Raises:
      CheckpointError: The directory is something else. The message says what it is and what to do.
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
    convert = f"grinqh-jax convert --model {directory} --out OUT"
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


def _all_shardings(
    leaves: Iterable[str], shardings: Mapping[str, jax.sharding.Sharding]
) -> dict[str, jax.sharding.Sharding]:
    """Returns the sharding of each leaf: the given one, or that of the first device."""
    if unknown := sorted(shardings.keys() - set(leaves)):
        raise UsageError(f"shardings for leaves that the model does not have: {', '.join(unknown)}")
    return dict.fromkeys(leaves, _first_device()) | dict(shardings)


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _restore(
    directory: Path,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, jax.sharding.Sharding] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Reads some arrays from ``state/``, by dotted name, to the first device unless they have a sharding."""
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings.get(name, _first_device()))
        for name, leaf in leaves.items()
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    context.memory.read_concurrent_bytes = max(READ_AHEAD_BYTES, 2 * largest)
    try:
        with context:
            tree = ocp.load(directory.absolute(), traverse_util.unflatten_dict(abstract, sep="."))
    # Orbax and TensorStore can raise anything. The files match their checksums, so they are not damaged.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: Orbax cannot restore state/: {reason:.300}") from error
    return traverse_util.flatten_dict(tree, sep=".")


def _damaged(directory: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{directory} is damaged (copy or download it again, or convert the model again): "
        + "; ".join(problems)
    )
