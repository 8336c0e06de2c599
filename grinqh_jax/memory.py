"""How much memory this process has needed."""

import resource
import sys
from pathlib import Path

import jax

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """The most bytes in use so far: on the accelerator, or where there is none, resident in the host."""
    statistics = jax.local_devices()[0].memory_stats()
    if jax.default_backend() != "cpu" and statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return peak_host_memory()


def peak_host_memory() -> int:
    """The most resident bytes that this process has had."""
    # Not getrusage where /proc is there: Linux lets its peak begin with that of the parent process.
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
