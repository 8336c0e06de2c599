"""A progress bar that shows the memory in use."""

from tqdm import tqdm

from grinqh_jax.memory import memory_in_use


class Progress:
    """A progress bar on stderr, hidden if stderr is not a terminal.

    Call it with the number of units completed since the last call.
    """

    def __init__(self, description: str, total: int, unit: str):
        self._bar = tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=None)

    def __call__(self, units: int, note: str = "") -> None:
        """Advances the bar by ``units`` and shows ``note`` beside the memory in use."""
        memory = f"{memory_in_use() / 2**20:.0f} MiB"
        self._bar.set_postfix_str(f"{note}, {memory}" if note else memory, refresh=False)
        self._bar.update(units)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()
