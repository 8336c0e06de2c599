"""Progress of a long command on stderr: the step, the time left and the memory in use."""

import sys
import time

from tqdm import tqdm

from grinqh_jax.memory import memory_in_use

LINE_SECONDS = 60.0
"""Shortest time between two lines where stderr is not a terminal."""


class Progress:
    """A bar if stderr is a terminal; otherwise a line every minute, the first one after a minute.

    Call it with the number of units completed since the last call.

    Args:
      description: What is in progress.
      total: Number of units in all.
      unit: Name of a unit. Without one the units are shares of the work, and the bar shows per cent only.
    """

    def __init__(self, description: str, total: float, unit: str = ""):
        self._description, self._total, self._completed = description, total, 0.0
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=description,
            unit=unit,
            unit_scale=True,
            smoothing=0,  # The time left follows from the whole time so far.
            bar_format=None if unit else "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=None,
        )

    def __call__(self, units: float, note: str = "") -> None:
        """Advances by ``units`` and shows ``note``, which names the step, beside the memory in use."""
        self._completed += units
        now = time.monotonic()
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(self._facts(note)), refresh=False)
            self._bar.update(units)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = (now - self._started) * (self._total / self._completed - 1) if self._completed else 0.0
            facts = [f"{self._completed / self._total:.0%}", f"{tqdm.format_interval(left)} left"]
            print(f"{self._description}: {', '.join(facts + self._facts(note))}", file=sys.stderr, flush=True)

    def _facts(self, note: str) -> list[str]:
        memory = f"{memory_in_use() / 2**20:,.0f} MiB"
        return [note, memory] if note else [memory]

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()
