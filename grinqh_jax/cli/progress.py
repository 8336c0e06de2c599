"""A progress bar that shows the memory in use."""

from pathlib import Path

import jax
from tqdm import tqdm

from grinqh_jax.memory import peak_memory

_STATUS = Path("/proc/self/status")


class Progress:
    """A bar on stderr, silent where that is not a terminal. Call it with the number of units done."""

    def __init__(self, description: str, total: int, unit: str):
        self._bar = tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=None)

    def __call__(self, units: int, note: str = "") -> None:
        """Moves the bar on, with a note beside the memory."""
        memory = f"{memory_in_use() / 2**20:.0f} MiB"
        self._bar.set_postfix_str(f"{note}, {memory}" if note else memory, refresh=False)
        self._bar.update(units)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()


def memory_in_use() -> int:
    """Bytes in use now: on the accelerator, or where there is none, resident in the host.

    The peak where the system does not tell.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if jax.default_backend() != "cpu" and statistics and "bytes_in_use" in statistics:
        return statistics["bytes_in_use"]
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return peak_memory()
