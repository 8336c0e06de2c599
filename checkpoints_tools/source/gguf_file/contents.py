"""Reads the metadata of a GGUF file, and its tensors in ranges of rows.

The package ``gguf`` parses the header and dequantizes. Tensors are read with plain reads, because the pages
of a file that stays mapped count as memory of the process.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from grinqh_jax.errors import CheckpointError, UnsupportedModelError, UsageError
from grinqh_jax.hf.reader import Rows

PLAIN_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of the tensor types that are not quantized. These tensors are read as they are stored."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
      type: Name of its type, such as ``F16`` or ``Q4_1``.
      shape: Shape in NumPy's order: a matrix is ``[outputs, inputs]``, one of experts ``[experts, outputs,
        inputs]``.
      offset: Position of its first byte in the file.
      row_bytes: Bytes of a row, or of the whole vector.
      bits: Bits per value, the scales of its blocks included.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int
    bits: float

    @property
    def rows(self) -> int:
        """Number of rows: outputs of all experts, or 1 for a vector."""
        return math.prod(self.shape[:-1])


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file.

    Attributes:
      path: The file.
      metadata: Values by key: strings, numbers, booleans, or lists of them.
      tensors: Tensors by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def read(self, name: str, rows: Rows = slice(None)) -> np.ndarray:
        """Reads rows of a tensor: F16, BF16 and F32 as stored, other types dequantized to float32.

        Args:
          name: Name of the tensor in the file.
          rows: Range of rows, or their indices. The rows of experts follow one another.

        Raises:
          CheckpointError: The file vanished or is shorter than it was.
        """
        tensor = self.tensors[name]
        indices = np.arange(tensor.rows)[rows]
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        pieces = [self._read_bytes(name, tensor, run) for run in runs]
        stored = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        values = _values(stored, tensor.type)
        return values[0] if len(tensor.shape) == 1 else values

    def _read_bytes(self, name: str, tensor: Tensor, run: np.ndarray) -> np.ndarray:
        """Returns the bytes ``[rows, bytes of a row]`` of consecutive rows."""
        start, size = (int(run[0]), len(run)) if len(run) else (0, 0)
        try:
            stored = np.fromfile(
                self.path,
                np.uint8,
                count=size * tensor.row_bytes,
                offset=tensor.offset + start * tensor.row_bytes,
            )
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read tensor {name}: {error}") from None
        if stored.size != size * tensor.row_bytes:
            raise CheckpointError(f"{self.path}: tensor {name} ends behind the file; download the file again")
        return stored.reshape(size, tensor.row_bytes)


def _values(stored: np.ndarray, type_name: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, dequantize

    if type_name in PLAIN_DTYPES:
        return stored.view(PLAIN_DTYPES[type_name])
    # The package warns of overflows in the unused half of a block; the values themselves are finite.
    with np.errstate(all="ignore"):
        return dequantize(stored, GGMLQuantizationType[type_name])


def read_header(path: Path) -> GGUFFile:
    """Reads metadata and the list of tensors.

    Raises:
      UsageError: The package ``gguf`` is not installed.
      CheckpointError: The file is not GGUF, or is truncated or corrupt.
      UnsupportedModelError: The file is one of several, is big-endian, or has tensors of a type that the
        package ``gguf`` does not dequantize.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError(
            f"{path}: GGUF files need the package gguf; pip install 'grinqh-jax[gguf]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        described = [
            (str(t.name), t.tensor_type, t.shape.tolist(), int(t.data_offset)) for t in reader.tensors
        ]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: not a GGUF file, or truncated or corrupt ({reason:.120}); download it again"
        ) from None
    if reader.byte_order != "I":
        raise UnsupportedModelError(
            f"{path}: the file has the other byte order; convert it with gguf's tools"
        )
    if (parts := metadata.get("split.count", 0)) > 1:
        raise UnsupportedModelError(
            f"{path}: the model is split over {parts} files; merge them (llama-gguf-split --merge)"
        )
    tensors = {}
    for name, kind, shape, offset in described:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        tensors[name] = Tensor(
            type=kind.name,
            shape=tuple(reversed(shape)),
            offset=offset,
            row_bytes=shape[0] // block * block_bytes,
            bits=8 * block_bytes / block,
        )
    _check_types(path, tensors)
    return GGUFFile(path, metadata, tensors)


def _check_types(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses types that cannot be dequantized, trying each one on a row of zeros."""
    refused = []
    for type_name, row_bytes in {tensor.type: tensor.row_bytes for tensor in tensors.values()}.items():
        try:
            _values(np.zeros((1, row_bytes), np.uint8), type_name)
        except NotImplementedError:
            refused.append(type_name)
    if refused:
        raise UnsupportedModelError(
            f"{path}: tensors of type {', '.join(sorted(refused))} cannot be dequantized by the package gguf;"
            " use a file of another type, such as F16 or Q8_0"
        )
