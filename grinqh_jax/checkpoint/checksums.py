"""CRC-32 checksums of arrays and files."""

import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

_CHUNK_BYTES = 1 << 23

Item = TypeVar("Item")
Result = TypeVar("Result")


def checksum(data: np.ndarray | bytes | memoryview) -> str:
    """Returns the CRC-32 of bytes, or of an array's bytes in C order, as ``crc32:xxxxxxxx``.

    It takes no longer than reading the memory. It detects accidents, such as a flipped byte or exchanged
    files, but not attacks.
    """
    if isinstance(data, np.ndarray):
        # zlib does not accept bfloat16 buffers, so it gets the array as uint8.
        return checksum(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return f"crc32:{zlib.crc32(data):08x}"


def file_checksum(path: Path) -> str:
    """Returns the ``checksum`` of a file's bytes, which are read in chunks. Raises OSError."""
    value, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            value = zlib.crc32(buffer[:size], value)
    return f"crc32:{value:08x}"


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Returns ``[function(item) for item in items]``, computed by up to 8 threads.

    Threads help only if ``function`` releases the GIL, as file reads and zlib do.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
