"""A progress bar that shows the memory in use."""

import resource
import sys
from pathlib import Path

from tqdm import tqdm

_STATUS = Path("/proc/self/status")


def memory_in_use() -> int:
    """Resident bytes of this process now (its peak where the system has no /proc)."""
    return _from_status("VmRSS")


def peak_memory() -> int:
    """The most resident bytes that this process has had."""
    return _from_status("VmHWM")


def _from_status(field: str) -> int:
    # Not getrusage where /proc is there: Linux lets its peak begin with that of the parent process.
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """A bar on stderr, silent where that is not a terminal. Call it with the name of what is done."""

    def __init__(self, description: str, steps: int):
        self._bar = tqdm(total=steps, desc=description, unit="part", disable=None)

    def __call__(self, part: str) -> None:
        self._bar.set_postfix_str(f"{part}, {memory_in_use() / 2**20:.0f} MiB", refresh=False)
        self._bar.update()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()
