"""``manifest.json``: shape, dtype and checksum of each leaf (array), size and checksum of each file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from grinqh_jax.checkpoint.checksums import checksum, file_checksum, in_threads
from grinqh_jax.errors import CheckpointError
from grinqh_jax.json_files import read_json, write_json

MANIFEST = "manifest.json"
STATE = "state"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Description of an array of the state tree.

    Attributes:
      shape: Shape of the array.
      dtype: Numpy name of its dtype, e.g. ``uint32`` or ``bfloat16``.
      checksum: ``checksums.checksum`` of the array.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: str

    @classmethod
    def of(cls, array: np.ndarray) -> "Leaf":
        """Returns the description of an array."""
        return cls(tuple(array.shape), array.dtype.name, checksum(array))

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object that describes the leaf."""
        return {"shape": list(self.shape), "dtype": self.dtype, "checksum": self.checksum}

    @classmethod
    def from_json(cls, entry: Any) -> "Leaf":
        """Parses the object of ``to_json``. Raises CheckpointError if a field is missing or wrong."""
        match entry:
            case {"shape": list(shape), "dtype": str(dtype), "checksum": str(value)} if all(
                type(size) is int for size in shape
            ):
                return cls(tuple(shape), dtype, value)
        raise CheckpointError(f"expected shape, dtype and checksum, found {entry!r:.80}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The complete contents of a checkpoint.

    Attributes:
      leaves: Descriptions of the arrays by dotted name, e.g. ``layers.0.qkv.planes``.
      files: ``(size in bytes, checksum)`` of each file but the manifest, by its path relative to the
        checkpoint, separated by ``/``. The last field of the manifest is a checksum of its other fields.
    """

    leaves: Mapping[str, Leaf]
    files: Mapping[str, tuple[int, str]]

    @classmethod
    def of_directory(cls, directory: Path, leaves: Mapping[str, Leaf]) -> "Manifest":
        """Describes a directory whose files are correct. Reads every file."""
        names = [name for name in _file_names(directory) if name != MANIFEST]
        sums = in_threads(lambda name: file_checksum(directory / name), names)
        sizes = [(directory / name).stat().st_size for name in names]
        return cls(dict(leaves), dict(zip(names, zip(sizes, sums, strict=True), strict=True)))

    def write(self, directory: Path) -> None:
        """Writes ``manifest.json``."""
        body = {
            "leaves": {name: leaf.to_json() for name, leaf in sorted(self.leaves.items())},
            "files": {n: {"size": size, "checksum": value} for n, (size, value) in self.files.items()},
        }
        write_json(directory / MANIFEST, {**body, "checksum": _body_checksum(body)})

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads ``manifest.json``.

        Raises:
          CheckpointError: The file is missing or malformed, or its own checksum does not match.
        """
        match read_json(directory / MANIFEST):
            case {"leaves": dict(leaves), "files": dict(files), "checksum": value, **rest} if not rest:
                if value != _body_checksum({"leaves": leaves, "files": files}):
                    raise CheckpointError(f"{MANIFEST} does not agree with its own checksum")
            case _:
                raise CheckpointError(f"{MANIFEST} does not consist of leaves, files and a checksum")
        for name, entry in files.items():
            match entry:
                case {"size": int(), "checksum": str()} if _is_inside(name):
                    continue
            raise CheckpointError(f"{MANIFEST}: file {name!r:.80} is described by {entry!r:.80}")
        return cls(
            {name: Leaf.from_json(entry) for name, entry in leaves.items()},
            {name: (entry["size"], entry["checksum"]) for name, entry in files.items()},
        )

    def file_problems(self, directory: Path) -> dict[str, str]:
        """Compares the files of ``directory`` with the manifest; returns the problem of each wrong path.

        A file that the manifest does not list is a problem only under ``state/``, where Orbax might read it.
        """
        problems = in_threads(lambda name: _file_problem(directory / name, *self.files[name]), self.files)
        listed = {name: problem for name, problem in zip(self.files, problems, strict=True) if problem}
        unlisted = [name for name in _file_names(directory / STATE, STATE) if name not in self.files]
        return listed | dict.fromkeys(unlisted, "does not belong here")

    def tree_problems(self, abstract_tree: Mapping[str, Any]) -> list[str]:
        """Compares the leaves with those that a model needs; returns a message for each difference.

        Args:
          abstract_tree: Nested dict of ``jax.ShapeDtypeStruct`` (``decoder.abstract_tree``).
        """
        expected = traverse_util.flatten_dict(abstract_tree, sep=".")
        problems = [f"{name} is missing" for name in expected if name not in self.leaves]
        problems += [f"{name} is unknown to this model" for name in self.leaves if name not in expected]
        for name, abstract in expected.items():
            if leaf := self.leaves.get(name):
                dtype = jnp.dtype(abstract.dtype).name
                if leaf.shape != tuple(abstract.shape):
                    problems.append(f"{name} has shape {list(leaf.shape)}, expected {list(abstract.shape)}")
                if leaf.dtype != dtype:
                    problems.append(f"{name} has dtype {leaf.dtype}, expected {dtype}")
        return problems

    def array_problems(self, arrays: Mapping[str, jax.Array]) -> list[str]:
        """Compares arrays, by dotted name, with the leaves; returns a message for each difference.

        Skips arrays of which this process holds only some shards.
        """
        names = [name for name, array in arrays.items() if array.is_fully_addressable]
        loaded = in_threads(lambda name: Leaf.of(np.asarray(arrays[name])), names)
        return [
            f"{name} was written as {self.leaves[name].to_json()} but reads as {leaf.to_json()}"
            for name, leaf in zip(names, loaded, strict=True)
            if leaf != self.leaves[name]
        ]


def _body_checksum(body: Mapping[str, Any]) -> str:
    """Returns the checksum of the manifest's fields, which its last field holds."""
    return checksum(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _file_names(directory: Path, prefix: str = "") -> list[str]:
    """Returns the paths of all files below a directory, relative to it and prefixed, separated by ``/``."""
    return sorted(
        PurePosixPath(prefix, path.relative_to(directory).as_posix()).as_posix()
        for path in directory.rglob("*")
        if not path.is_dir()
    )


def _is_inside(name: str) -> bool:
    """Whether a path of the manifest stays inside the checkpoint."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _file_problem(path: Path, size: int, expected: str) -> str | None:
    """Compares a file with its size and checksum; returns None if they agree."""
    try:
        if not path.exists():
            return "is missing"
        if not path.is_file():
            return "is not a regular file"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes, expected {size}"
        actual = file_checksum(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None if actual == expected else f"has checksum {actual}, expected {expected}"
