"""The memory that this process uses, now and at its peak, and what it gives back."""

import ctypes
import re
import resource
import sys
from pathlib import Path

import jax
import psutil

_STATUS = Path("/proc/self/status")

LARGE_BYTES = 1 << 22
"""Arrays from this size on have pages of their own with ``give_back_large_arrays``."""

_M_MMAP_THRESHOLD = -3
"""Parameter of ``mallopt`` in glibc."""


def memory_in_use() -> int:
    """Returns the bytes in use now: on the accelerator or, without one, resident in the host."""
    return _accelerator_bytes("bytes_in_use") or psutil.Process().memory_info().rss


def free_memory() -> int | None:
    """Returns the free bytes of the device of ``memory_in_use``; None if an accelerator reports none."""
    if jax.default_backend() == "cpu":
        return psutil.virtual_memory().available
    limit, used = _accelerator_bytes("bytes_limit"), _accelerator_bytes("bytes_in_use")
    return None if limit is None or used is None else limit - used


def peak_memory() -> int:
    """Returns the largest number of bytes in use so far, on the same device as ``memory_in_use``."""
    return _accelerator_bytes("peak_bytes_in_use") or peak_host_memory()


def give_back_large_arrays() -> None:
    """Makes glibc give back the memory of large arrays when they are freed; other C libraries are left alone.

    By itself glibc keeps arrays of up to 32 MiB for later ones.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_freed_memory() -> None:
    """Makes glibc give back all memory that is free now; other C libraries are left alone.

    By itself glibc keeps what compilers freed in the middle of its heaps.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_host_memory() -> int:
    """Returns the largest resident size that this process has had, in bytes."""
    # psutil 7.2 reports no peak on Linux, and the peak of getrusage starts at the parent process's.
    if _STATUS.exists() and (peak := re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)):
        return int(peak[1]) * 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def _accelerator_bytes(statistic: str) -> int | None:
    """Returns a memory statistic of the first accelerator; None if there is none or it does not report it."""
    if jax.default_backend() == "cpu":
        return None
    return (jax.local_devices()[0].memory_stats() or {}).get(statistic)
