"""The parts of an unfinished checkpoint on disk. Orbax writes them one by one, and merges them at the end."""

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import traverse_util

from grinqh_jax.checkpoint.manifest import Leaf
from grinqh_jax.errors import CheckpointError
from grinqh_jax.json_files import read_json

# Each `ocp.partial.save("parts", ...)` adds a directory under "parts.partial_save". The directory appears by
# one rename and stores the call's `custom_metadata` in _CHECKPOINT_METADATA. An unfinished part has a longer
# name, beside "parts.partial_save".
_PARTS = "parts"
_PARTIAL_SAVE = ".partial_save"
_ORBAX_METADATA = "_CHECKPOINT_METADATA"
# Orbax 0.12 writes the path of the partial directory into this file, and reads it only on cloud storage.
_ORBAX_COMMIT_FILE = "commit_success.txt"
_SEALED = "sealed"
_METADATA_BYTES = 1 << 16
"""Upper estimate of the bytes of metadata that Orbax writes with a part."""


class Parts:
    """The complete parts in a directory.

    Attributes:
      leaves: Leaves of each part, by the name of the part.
    """

    def __init__(self, directory: Path):
        """Finds the complete parts of an earlier run, and deletes unfinished ones."""
        self._directory = directory
        self._sealed_leaves: frozenset[str] = frozenset()
        parts = directory / (_PARTS + _PARTIAL_SAVE)
        remove(path for path in directory.glob(parts.name + "*") if path != parts)
        self.leaves: dict[str, dict[str, Leaf]] = {}
        for metadata in sorted(parts.glob("*/" + _ORBAX_METADATA)):
            part = read_json(metadata)["custom_metadata"]
            self.leaves[part["part"]] = {leaf: Leaf.from_json(spec) for leaf, spec in part["leaves"].items()}

    @property
    def all_leaves(self) -> dict[str, Leaf]:
        """Leaves of all parts, by dotted name."""
        return {leaf: spec for part in self.leaves.values() for leaf, spec in part.items()}

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a part. If the process dies during the call, the part does not exist.

        Args:
          name: Name of the part.
          arrays: Leaves by dotted name.

        Raises:
          OSError: The part cannot be written: the disk is full.
        """
        leaves = {leaf: Leaf.of(array) for leaf, array in arrays.items()}
        record = {leaf: spec.to_json() for leaf, spec in leaves.items()}
        with _orbax_context(self._directory):
            ocp.partial.save(
                self._directory / _PARTS,
                traverse_util.unflatten_dict(arrays, sep="."),
                # Orbax commits this record together with the arrays, so they cannot disagree.
                custom_metadata={"part": name, "leaves": record},
            )
        self.leaves[name] = leaves

    def read(self, name: str) -> dict[str, Any]:
        """Returns the leaves at or below a dotted name, as a nested dict from the root, on the first device.

        Raises:
          CheckpointError: No leaf at or below that name has been written.
        """
        wanted = {leaf: spec for leaf, spec in self.all_leaves.items() if f"{leaf}.".startswith(f"{name}.")}
        if not wanted:
            raise CheckpointError(f"{name} has not been written")
        if not self._sealed_leaves.issuperset(wanted):  # Orbax reads from finished checkpoints only.
            self.seal()
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            leaf: jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(spec.dtype), sharding=first_device)
            for leaf, spec in wanted.items()
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return ocp.load(self._directory / _SEALED, traverse_util.unflatten_dict(abstract, sep="."))

    def seal(self) -> Path:
        """Merges the parts into one Orbax checkpoint and returns its directory.

        Orbax merges in place and cannot resume an interrupted merge. This function therefore merges hard
        links to the files of the parts, and the parts stay unchanged: if the process dies, a later run can
        seal them.

        Raises:
          OSError: The disk is full.
        """
        self.require_space(0)
        sealed = self._directory / _SEALED
        merging = sealed.with_name(sealed.name + _PARTIAL_SAVE)
        remove(path for path in (sealed, merging) if path.exists())
        shutil.copytree(self._directory / (_PARTS + _PARTIAL_SAVE), merging, copy_function=_link_data)
        with _orbax_context(self._directory):
            ocp.partial.finalize(sealed)
        (sealed / _ORBAX_COMMIT_FILE).unlink(missing_ok=True)
        self._sealed_leaves = frozenset(self.all_leaves)
        return sealed

    def require_space(self, data_bytes: int) -> None:
        """Raises OSError if the disk has no space for that much data and the metadata of Orbax.

        TensorStore would raise, too, but only after its threads have printed tracebacks.
        """
        if shutil.disk_usage(self._directory).free < data_bytes + data_bytes // 50 + _METADATA_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))


def remove(paths: Iterable[Path]) -> None:
    """Deletes files and directories."""
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _orbax_context(path: Path) -> Iterator[None]:
    """Sets the storage format for Orbax, and turns system errors of TensorStore into OSError on ``path``."""
    context = ocp.Context()
    context.array.saving.use_zarr3 = True
    # Digits of rounded weights are nearly random: compression takes time and saves almost nothing.
    context.array.saving.use_compression = False
    # Orbax logs the traceback of each of its threads that fails, and raises the same error.
    log = logging.getLogger("absl")
    log.addFilter(_is_no_thread_traceback)
    try:
        with context:
            yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    finally:
        log.removeFilter(_is_no_thread_traceback)


def _is_no_thread_traceback(record: logging.LogRecord) -> bool:
    return "raised an exception" not in record.getMessage()


def _link_data(source: str, target: str) -> None:
    """Links data files (under ``d/``), which a merge only moves, and copies metadata, which it rewrites."""
    if Path(source).parent.name == "d":
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # the file system has no hard links
    shutil.copyfile(source, target)
