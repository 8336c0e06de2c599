"""The choice between the implementations of a function."""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TypeVar

Name = TypeVar("Name", bound=str)


def first_supporting(
    refusal: str,
    implementations: Mapping[Name, ModuleType],
    implementation: Name | None,
    *arguments: object,
) -> Name:
    """Returns the name of the first implementation that supports the arguments.

    Args:
      refusal: Beginning of the error if no implementation fits.
      implementations: Modules by name, in order of preference. ``supports(*arguments)`` of a module returns
        None, or the reason why it cannot run.
      implementation: Name of the only implementation to consider; None for all.
      arguments: Arguments of ``supports``.

    Raises:
      ValueError: The implementation is unknown.
      NotImplementedError: No implementation supports the arguments. The message gives the reasons.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(
            f"unknown implementation {implementation!r}: choose from {', '.join(implementations)}"
        )
    reasons = []
    names: Iterable[Name] = implementations if implementation is None else (implementation,)
    for name in names:
        reason = implementations[name].supports(*arguments)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{refusal}: " + "; ".join(reasons))
