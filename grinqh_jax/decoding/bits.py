"""The setting of the dial: mean bits to read per weight, or everything that is stored."""

from collections.abc import Sequence
from typing import Final, Literal

from grinqh_jax.errors import UsageError

FULL: Final = "full"
"""The setting that reads every stored bit."""

Bits = float | Literal["full"]
"""A setting of the dial: mean bits per weight, or ``FULL``."""

DEFAULT_BITS = 4.0
"""Mean bits of a request that names none: close to full precision for a third of the bytes."""


def check_bits(bits: float, targets: Sequence[float]) -> None:
    """Raises UsageError if ``bits`` is outside the range of a model's threshold targets."""
    if not targets[0] <= bits <= targets[-1]:
        raise UsageError(
            f"bits {bits:g}: this checkpoint's dial goes from {targets[0]:g} to {targets[-1]:g}, or full"
        )
