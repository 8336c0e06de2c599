"""The setting of speculation in words. This module does not import JAX, so flags are checked at once."""

import dataclasses
from typing import Literal

from grinqh_jax.decoding.bits import FULL, Bits
from grinqh_jax.errors import UsageError

DEFAULT_SELF_BITS = 2.0
"""Mean bits of the drafts of ``self``."""


@dataclasses.dataclass(frozen=True)
class SpeculationSetting:
    """The drafter that a user asks for.

    Attributes:
      drafter: ``"lookup"`` for prompt lookup, ``"self"`` for the model at fewer bits, ``"model"`` for another
        model.
      model: Directory or hub id of another model.
      bits: Mean bits of the drafts; None for the default.
    """

    drafter: Literal["lookup", "self", "model"]
    model: str | None = None
    bits: Bits | None = None

    @classmethod
    def parse(cls, text: str) -> "SpeculationSetting | None":
        """Parses ``off`` (None), ``lookup``, ``self[@BITS]`` or ``MODEL[@BITS]``.

        Raises:
          UsageError: The text is empty, or has bits where there can be none.
        """
        name, at, suffix = text.rpartition("@")
        bits = _bits(suffix) if at else None
        if bits is None:
            name = text
        if not name:
            raise UsageError(f"speculate {text!r}: expected off, lookup, self[@BITS] or MODEL[@BITS]")
        if name in ("off", "lookup") and bits is not None:
            raise UsageError(f"speculate {text!r}: {name} has no bits; write {name}")
        if name == "off":
            return None
        if name == "lookup":
            return cls("lookup")
        if name == "self":
            return cls("self", bits=DEFAULT_SELF_BITS if bits is None else bits)
        return cls("model", name, bits)


def _bits(text: str) -> Bits | None:
    """Returns the bits that a suffix names; None if it is no number and not ``full``."""
    if text == FULL:
        return FULL
    try:
        return float(text)
    except ValueError:
        return None
