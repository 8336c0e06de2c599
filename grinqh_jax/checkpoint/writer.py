"""Writing a checkpoint part by part: bounded memory, resumable, and whole or not there at all."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import traverse_util

from grinqh_jax.checkpoint.manifest import MANIFEST, Leaf, Manifest
from grinqh_jax.checkpoint.quantization import VERSION, QuantizationConfig
from grinqh_jax.checkpoint.values import value_problems
from grinqh_jax.errors import CheckpointError
from grinqh_jax.json_files import read_json, write_json
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import abstract_tree

# Orbax gathers the parts of `ocp.partial.save("parts", ...)` under "parts.partial_save", each in a directory
# of its own that appears by one rename and keeps its `custom_metadata` in this file. While a part is
# being written it lies beside it, under a longer name.
_PARTS = "parts"
_PARTIAL_SAVE = ".partial_save"
_ORBAX_METADATA = "_CHECKPOINT_METADATA"
_SEALED = "sealed"
CONVERSION = "conversion.json"
_LOCK = "lock"
_RESUME_STATE = "resume_state-"


class Writer:
    """Writes one GRINQH checkpoint directory, part after part.

    Everything is written to the sibling directory ``<path>.partial`` and moved to ``path`` by one
    rename when it is complete, so whatever ``path`` holds is whole. If the process dies, a new
    ``Writer`` with the same ``fingerprint`` goes on where the old one stopped:

        with Writer(out, fingerprint=fingerprint, overwrite=force) as writer:
            for name, make_tree in parts:
                if name not in writer.parts:
                    writer.save_part(name, make_tree())
            writer.finalize(hf_config, quantization, files=[source / "tokenizer.json"])

    Args:
      path: the directory to make. Its parent is created if it is not there.
      fingerprint: any string that is equal for two conversions if, and only if, their parts are
        interchangeable: a hash of the source's files, the options and the converter's version.
      overwrite: replace a finished checkpoint at ``path`` (it stays in place until the new one is
        complete) and throw away a partial directory of another conversion. Without it both raise.

    Raises:
      CheckpointError: ``path`` exists, or ``<path>.partial`` belongs to another conversion, or another
        process is writing there now. The message says what to do.
    """

    def __init__(self, path: str | Path, *, fingerprint: str, overwrite: bool = False):
        self.path = Path(path).absolute()
        self._refuse_existing(overwrite)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._partial)
        try:
            self._enter_conversion({"fingerprint": fingerprint, "version": VERSION}, overwrite)
            self._leaves = self._completed_parts()
            self._sealed_parts: frozenset[str] = frozenset()
        except BaseException:
            self.close()
            raise

    @property
    def parts(self) -> frozenset[str]:
        """Names of the parts that are complete, those of an interrupted run included."""
        return frozenset(self._leaves)

    def resume_state(self, name: str) -> dict[str, np.ndarray] | None:
        """What was handed over with a part, if no later one has handed over anything (see ``save_part``)."""
        file = self._resume_state_file(name)
        if name not in self._leaves or not file.exists():
            return None
        with np.load(file) as arrays:
            return dict(arrays)

    def save_part(
        self, name: str, tree: Mapping[str, Any], resume_state: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Writes one part, completely or (if the process dies) not at all.

        Args:
          name: free, but unique and the same from run to run, e.g. ``layers.0``.
          tree: nested dictionary from the root of the state tree, e.g.
            ``{"layers": {"0": {"qkv": {"planes": ..., "scales": ...}}}}``, of numpy or JAX arrays.
            The arrays may be released when this returns.
          resume_state: arrays that a later run needs to go on behind this part, if it is the last one that
            is complete. They are not in the checkpoint.

        Raises:
          CheckpointError: the part, or one of its leaves, has been written already, or a float leaf
            holds NaN or Inf, or what ``values`` refuses.
        """
        arrays = {
            leaf: np.asarray(array) for leaf, array in traverse_util.flatten_dict(tree, sep=".").items()
        }
        written = {leaf for part in self._leaves.values() for leaf in part}
        problems = [f"part {name} has been written already"] if name in self._leaves else []
        problems += [f"{leaf} has been written already" for leaf in arrays if leaf in written]
        problems += [
            f"{leaf} holds NaN or Inf" for leaf, array in arrays.items() if not np.isfinite(array).all()
        ]
        problems += value_problems(arrays)
        if problems:
            raise CheckpointError("; ".join(problems))
        leaves = {leaf: Leaf.of(array) for leaf, array in arrays.items()}
        record = {leaf: spec.to_json() for leaf, spec in leaves.items()}
        if resume_state is not None:
            writing = self._partial / "handing_over.npz"
            np.savez(writing, **resume_state)
            writing.rename(self._resume_state_file(name))
        with _storage():
            ocp.partial.save(
                self._partial / _PARTS,
                traverse_util.unflatten_dict(arrays, sep="."),
                # Orbax commits this together with the arrays, so the record of what is complete cannot
                # disagree with them.
                custom_metadata={"part": name, "leaves": record},
            )
        self._leaves[name] = leaves
        if resume_state is not None:
            earlier = self._partial.glob(_RESUME_STATE + "*")
            _remove(file for file in earlier if file != self._resume_state_file(name))

    def read_part(self, name: str) -> dict[str, Any]:
        """Reads back what ``save_part`` was given: a nested dictionary of arrays on the first device.

        Raises:
          CheckpointError: the part has not been written.
        """
        if name not in self._leaves:
            raise CheckpointError(f"part {name} has not been written")
        if self._sealed_parts != self.parts:  # Orbax reads whole checkpoints only, if only in part.
            self._seal()
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wished = {
            leaf: jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(spec.dtype), sharding=here)
            for leaf, spec in self._leaves[name].items()
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return ocp.load(self._partial / _SEALED, traverse_util.unflatten_dict(wished, sep="."))

    def finalize(
        self, config: Mapping[str, Any], quantization: QuantizationConfig, files: Iterable[str | Path] = ()
    ) -> Path:
        """Seals the checkpoint, moves it to ``path`` and returns that. The writer is closed after.

        Args:
          config: Hugging Face's ``config.json`` of the source model; ``quantization_config`` is set here.
          quantization: goes into ``config.json`` and fixes, with ``config``, which leaves must be there.
          files: files to copy along under their own names: tokenizer files, ``generation_config.json``,
            chat templates. One that does not exist is an OSError.

        Raises:
          CheckpointError: leaves are missing, unexpected, or of another shape or dtype than
            ``decoder.abstract_tree`` asks for; all are named.
        """
        leaves = {leaf: spec for part in self._leaves.values() for leaf, spec in part.items()}
        wished = abstract_tree(ModelConfig.from_hf(config), quantization.max_bits, len(quantization.targets))
        if problems := Manifest(leaves, {}).tree_problems(wished):
            raise CheckpointError(f"{self.path} cannot be completed: " + "; ".join(problems))
        sealed = self._seal()
        write_json(sealed / "config.json", {**config, "quantization_config": quantization.to_json()})
        for file in map(Path, files):
            if (sealed / file.name).exists():
                raise CheckpointError(f"{file} cannot be copied along: its name is taken in a checkpoint")
            shutil.copyfile(file, sealed / file.name)
        Manifest.of_directory(sealed, leaves).write(sealed)
        replaced = self.path.with_name(self.path.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.exists():
            self.path.rename(replaced)
        sealed.rename(self.path)
        shutil.rmtree(replaced, ignore_errors=True)
        self.close()
        shutil.rmtree(self._partial)
        return self.path

    def close(self) -> None:
        """Gives up the lock on ``<path>.partial``, which stays for a later run. Idempotent."""
        self._lock.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _resume_state_file(self, name: str) -> Path:
        return self._partial / f"{_RESUME_STATE}{name}.npz"

    def _refuse_existing(self, overwrite: bool) -> None:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not (self.path / MANIFEST).is_file():
            raise CheckpointError(f"{self.path} exists and is not a GRINQH checkpoint; choose another path")
        if not overwrite:
            raise CheckpointError(f"{self.path} exists; choose another path, or --force to replace it")

    def _enter_conversion(self, conversion: dict[str, Any], overwrite: bool) -> None:
        """Makes sure that ``<path>.partial`` holds parts of this conversion or none."""
        record = self._partial / CONVERSION
        if record.exists():
            try:
                same = read_json(record) == conversion
            except CheckpointError:  # died while writing the record, before any part
                same = False
            if same:
                return
            if not overwrite:
                raise CheckpointError(
                    f"{self._partial} holds an unfinished conversion of another model or with other options; "
                    "finish that one, choose another path, or --force to start over"
                )
        _remove(entry for entry in self._partial.iterdir() if entry.name != _LOCK)
        write_json(record, conversion)

    def _completed_parts(self) -> dict[str, dict[str, Leaf]]:
        """Leaves of what an interrupted run completed; clears away what it did not."""
        parts = self._partial / (_PARTS + _PARTIAL_SAVE)
        _remove(p for p in self._partial.glob(parts.name + "*") if p != parts)
        leaves = {}
        for metadata in sorted(parts.glob("*/" + _ORBAX_METADATA)):
            part = read_json(metadata)["custom_metadata"]
            leaves[part["part"]] = {leaf: Leaf.from_json(spec) for leaf, spec in part["leaves"].items()}
        return leaves

    def _seal(self) -> Path:
        """Makes one Orbax checkpoint of the parts.

        Orbax merges the parts in place, and a merge that was cut off cannot be taken up again. So it works
        on a second set of links to the same files, and the parts stay as they are: whenever the
        process dies, the next one can seal again.
        """
        sealed = self._partial / _SEALED
        merging = sealed.with_name(sealed.name + _PARTIAL_SAVE)
        _remove(p for p in (sealed, merging) if p.exists())
        shutil.copytree(self._partial / (_PARTS + _PARTIAL_SAVE), merging, copy_function=_link_data)
        with _storage():
            ocp.partial.finalize(sealed)
        self._sealed_parts = self.parts
        return sealed


def _lock(partial: Path):
    """Takes the lock of a partial directory; the system gives it up when the process dies."""
    file = (partial / _LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(f"{partial} is being written by another process; wait for it to end") from None
    return file


def _storage() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_zarr3 = True
    # Digits of rounded weights are close to random: compressing them costs time and saves next to nothing.
    context.array.saving.use_compression = False
    return context


def _link_data(source: str, target: str) -> None:
    """Links the files that a merge only moves (under ``d/``); copies those that it rewrites."""
    if Path(source).parent.name == "d":
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # a file system without hard links: pay for the copy
    shutil.copyfile(source, target)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
