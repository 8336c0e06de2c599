"""Writes a checkpoint part by part, in bounded memory. Interrupted writes resume and never look complete."""

import fcntl
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from grinqh_jax.checkpoint.manifest import MANIFEST, Manifest
from grinqh_jax.checkpoint.parts import Parts, remove
from grinqh_jax.checkpoint.quantization import VERSION, QuantizationConfig
from grinqh_jax.checkpoint.values import value_problems
from grinqh_jax.companions import companion_path
from grinqh_jax.errors import CheckpointError
from grinqh_jax.json_files import read_json, write_json
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import abstract_tree
from pallas_kernels.x64 import without_x64

CONVERSION = "conversion.json"
_LOCK = "lock"
_RESUME_STATE = "resume_state-"


class Writer:
    """Writes a GRINQH checkpoint directory, one part after another.

    The parts go to the sibling directory ``<path>.partial``. One rename moves the complete checkpoint to
    ``path``, so ``path`` never holds an incomplete one. If the process dies, a new ``Writer`` with the same
    ``fingerprint`` continues where the old one stopped:

        with Writer(out, fingerprint=fingerprint, overwrite=force) as writer:
            for name, make_tree in parts:
                if name not in writer.parts:
                    writer.save_part(name, make_tree())
            writer.finalize(hf_config, quantization, files=[source / "tokenizer.json"])

    Args:
      path: Directory to create. Its parent is created if it does not exist.
      fingerprint: String that is equal for two conversions if and only if their parts are interchangeable:
        a hash of the source's files, the options and the converter's version.
      overwrite: Whether to replace a finished checkpoint at ``path``, which stays in place until the new one
        is complete, and to delete a partial directory of another conversion. If false, both raise.

    Raises:
      CheckpointError: ``path`` exists or is a mount point, ``<path>.partial`` belongs to another conversion,
        or another process is writing there. The message says what to do.
    """

    def __init__(self, path: str | Path, *, fingerprint: str, overwrite: bool = False):
        self.path = Path(path).absolute().resolve()  # the target of a link, not the link, is written
        self._refuse_existing(overwrite)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._partial)
        try:
            self._start_or_resume({"fingerprint": fingerprint, "version": VERSION}, overwrite)
            self._parts = Parts(self._partial)
        except BaseException:
            self.close()
            raise

    @property
    def directory(self) -> Path:
        """Directory of the unfinished checkpoint, ``<path>.partial``."""
        return self._partial

    @property
    def parts(self) -> frozenset[str]:
        """Names of the complete parts, including those of an interrupted run."""
        return frozenset(self._parts.leaves)

    def resume_state(self, name: str) -> dict[str, np.ndarray] | None:
        """Returns the arrays that ``save_part`` saved with a part to resume after it.

        None if there were none, or if a later part with a resume state has replaced them.
        """
        file = self._resume_state_file(name)
        if name not in self._parts.leaves or not file.exists():
            return None
        with np.load(file) as arrays:
            return dict(arrays)

    @without_x64
    def save_part(
        self, name: str, tree: Mapping[str, Any], resume_state: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Writes a part. If the process dies during the call, the part does not exist.

        Args:
          name: Unique name of the part, the same in every run, e.g. ``layers.0``.
          tree: Nested dict of numpy or JAX arrays from the root of the state tree, e.g.
            ``{"layers": {"0": {"qkv": {"planes": ..., "scales": ...}}}}``. The caller may release the arrays
            after the call.
          resume_state: Arrays that a later run needs to continue after this part, if it is the last complete
            one. The finished checkpoint does not contain them.

        Raises:
          CheckpointError: The part or one of its leaves already exists, a float leaf holds NaN or Inf, or a
            leaf breaks a rule of ``values``.
          OSError: The part cannot be written: the disk is full. Earlier parts stay complete.
        """
        arrays = {
            leaf: np.asarray(array) for leaf, array in traverse_util.flatten_dict(tree, sep=".").items()
        }
        problems = [f"part {name} has been written already"] if name in self._parts.leaves else []
        written = self._parts.all_leaves
        problems += [f"{leaf} has been written already" for leaf in arrays if leaf in written]
        problems += [
            f"{leaf} holds NaN or Inf" for leaf, array in arrays.items() if not np.isfinite(array).all()
        ]
        problems += value_problems(arrays)
        if problems:
            raise CheckpointError("; ".join(problems))
        self._parts.require_space(
            sum(array.nbytes for array in [*arrays.values(), *(resume_state or {}).values()])
        )
        if resume_state is not None:
            unfinished = self._partial / "resume_state.npz"
            np.savez(unfinished, allow_pickle=False, **resume_state)
            unfinished.rename(self._resume_state_file(name))
        self._parts.save(name, arrays)
        if resume_state is not None:
            earlier = self._partial.glob(_RESUME_STATE + "*")
            remove(file for file in earlier if file != self._resume_state_file(name))

    @without_x64
    def read(self, name: str) -> Any:
        """Reads back a subtree of the state tree that one or several parts have written.

        Args:
          name: Dotted name of the subtree's root in the state tree, such as ``layers.0``, or of a leaf.

        Returns:
          Nested dict, from that root, of the leaves written so far, on the first device; or the leaf.

        Raises:
          CheckpointError: No leaf at or below that name has been written.
        """
        tree = self._parts.read(name)
        for key in name.split("."):
            tree = tree[key]
        return tree

    @without_x64
    def finalize(
        self, config: Mapping[str, Any], quantization: QuantizationConfig, files: Iterable[str | Path] = ()
    ) -> Path:
        """Completes the checkpoint, moves it to ``path``, closes the writer, and returns ``path``.

        Args:
          config: Contents of the source model's Hugging Face ``config.json``. This function sets
            ``quantization_config`` in it.
          quantization: Quantization of the checkpoint. Together with ``config`` it determines the leaves that
            the checkpoint must have.
          files: Files to copy into the checkpoint under their names: tokenizer files,
            ``generation_config.json``, chat templates (``companions``).

        Raises:
          CheckpointError: Leaves are missing or unexpected, or differ in shape or dtype from
            ``decoder.abstract_tree``. The message names all of them.
          OSError: One of ``files`` does not exist, or the disk is full.
        """
        leaves = self._parts.all_leaves
        abstract = abstract_tree(
            ModelConfig.from_hf(config), quantization.max_bits, len(quantization.targets)
        )
        if problems := Manifest(leaves, {}).tree_problems(abstract):
            raise CheckpointError(f"{self.path} cannot be completed: " + "; ".join(problems))
        sealed = self._parts.seal()
        # A key that this library ignores may be infinite, because transformers accepts that.
        config = {**config, "quantization_config": quantization.to_json()}
        write_json(sealed / "config.json", config, allow_nan=True)
        for file in map(Path, files):
            target = companion_path(file, sealed)
            if target.exists():
                raise CheckpointError(f"{file} cannot be copied: a checkpoint has a file {file.name} already")
            shutil.copyfile(file, target)
        Manifest.of_directory(sealed, leaves).write(sealed)
        replaced = self.path.with_name(self.path.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.exists():
            self.path.rename(replaced)
        sealed.rename(self.path)
        shutil.rmtree(replaced, ignore_errors=True)
        # Under another name, because the next writer enters the partial directory when the lock is released.
        self._partial.rename(replaced)
        self.close()
        shutil.rmtree(replaced)
        return self.path

    def close(self) -> None:
        """Releases the lock on ``<path>.partial`` and leaves the directory for a later run. Idempotent."""
        self._lock.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _resume_state_file(self, name: str) -> Path:
        return self._partial / f"{_RESUME_STATE}{name}.npz"

    def _refuse_existing(self, overwrite: bool) -> None:
        """Raises CheckpointError if the finished checkpoint could not be moved to ``path``."""
        if self.path.is_mount():  # No rename can replace it, and the conversion would fail at its end.
            raise CheckpointError(f"{self.path} is a mount point; choose a directory inside it")
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not (self.path / MANIFEST).is_file():
            raise CheckpointError(f"{self.path} exists and is not a GRINQH checkpoint; choose another path")
        if not overwrite:
            raise CheckpointError(f"{self.path} exists; choose another path, or --force to replace it")

    def _start_or_resume(self, conversion: dict[str, Any], overwrite: bool) -> None:
        """Empties ``<path>.partial`` unless it holds parts of this conversion.

        Raises:
          CheckpointError: It holds parts of another conversion, and ``overwrite`` is false.
        """
        record = self._partial / CONVERSION
        if record.exists():
            try:
                same = read_json(record) == conversion
            except CheckpointError:  # the process died while writing the record, before any part
                same = False
            if same:
                return
            if not overwrite:
                raise CheckpointError(
                    f"{self._partial} holds an unfinished conversion of another model or with other options; "
                    "finish that one, choose another path, or --force to start over"
                )
        remove(entry for entry in self._partial.iterdir() if entry.name != _LOCK)
        write_json(record, conversion)


def _lock(partial: Path):
    """Locks a partial directory. The system releases the lock when the process dies."""
    file = (partial / _LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(f"{partial} is being written by another process; wait for it to end") from None
    return file
