"""The setting of the dial: mean bits to read per weight, or all stored bits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from grinqh_jax.errors import UsageError

FULL: Final = "full"
"""The setting that reads all stored bits."""

Bits = float | Literal["full"]
"""A setting of the dial: mean bits per weight, or ``FULL``."""

DEFAULT_BITS = 4.0
"""Mean bits of a request that names none: close to full precision for a third of the bytes."""


def check_bits(bits: float, targets: Sequence[float]) -> None:
    """Raises UsageError if ``bits`` is outside the range of a model's threshold targets."""
    if not targets[0] <= bits <= targets[-1]:
        raise _out_of_range([bits], targets)


def wanted_bits(
    settings: Sequence[Bits | None], targets: Sequence[float] | None, directory: Path
) -> list[float | None]:
    """Returns the mean bits that settings of the dial ask for; None for an unquantized model.

    Args:
      settings: Settings; None is the default.
      targets: Ascending mean bits of the model's threshold tables; None for an unquantized model.
      directory: The model's directory, for the message.

    Raises:
      UsageError: The model does not support a setting. The message names all such settings.
    """
    if targets is None:
        if graded := [setting for setting in settings if setting not in (None, FULL)]:
            raise UsageError(
                f"bits {_listed(graded)}: {directory} is not quantized and runs at full precision only; use "
                f"full, or convert it first (grinqh-jax convert --model {directory} --out DIR)"
            )
        return [None for _ in settings]
    least, most = targets[0], targets[-1]
    bits = [
        min(DEFAULT_BITS, most) if setting is None else most if setting == FULL else float(setting)
        for setting in settings
    ]
    if outside := [value for value in bits if not least <= value <= most]:
        raise _out_of_range(outside, targets)
    return list(bits)


def _out_of_range(bits: Sequence[float], targets: Sequence[float]) -> UsageError:
    return UsageError(
        f"bits {_listed(bits)}: this checkpoint's dial goes from {targets[0]:g} to {targets[-1]:g}, or full"
    )


def _listed(settings: Sequence[Bits]) -> str:
    return ", ".join(f"{setting:g}" if isinstance(setting, float) else str(setting) for setting in settings)
