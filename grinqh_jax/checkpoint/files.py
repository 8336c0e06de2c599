"""Reading files that may be damaged: checksums, JSON, lists of problems."""

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from grinqh_jax.errors import CheckpointError

_CHUNK_BYTES = 1 << 23
_LARGEST_JSON = 1 << 28


def checksum(data: np.ndarray | bytes) -> str:
    """CRC-32 of an array's bytes in C order (or of bytes), written ``crc32:xxxxxxxx``.

    It finds accidents (a flipped or missing byte, exchanged files), not attacks, at memory speed.
    """
    if isinstance(data, np.ndarray):
        # Through uint8, because a buffer of bfloat16 is not one that zlib takes.
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return f"crc32:{zlib.crc32(data):08x}"


def file_checksum(path: Path) -> str:
    """``checksum`` of a file's bytes, read in chunks. Raises OSError."""
    value, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            value = zlib.crc32(buffer[:size], value)
    return f"crc32:{value:08x}"


def in_threads(function, items: Iterable) -> list:
    """``[function(item) for item in items]`` on a few threads: reading and zlib let go of the GIL."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
      CheckpointError: it is missing, not a regular file, larger than 256 MiB, not UTF-8, or not JSON
        that Python can hold.
    """
    try:
        # A pipe or a device in a file's place would block open() for ever.
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(
                f"{path} is too large ({path.stat().st_size} bytes) to be what it should be"
            )
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad syntax, huge integers
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds an object.

    Raises:
      CheckpointError: as of ``read_json``; or it holds anything else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON. NaN and Inf are a ValueError, as in the JSON standard."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
