"""Announces the calls of a device that start programs, so that other processes can make the same calls."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from grinqh_jax.decoding.slots.prefix import Prefix

if TYPE_CHECKING:
    from grinqh_jax.decoding.slots.device import Device

Method = TypeVar("Method", bound=Callable[..., Any])


def announced(method: Method) -> Method:
    """Decorates a method that starts programs on all devices (``Device.on_call``)."""

    @functools.wraps(method)
    def call(self: "Device", *arguments: Any) -> Any:
        if self.on_call is not None:
            self.on_call(method.__name__, arguments)
        result = method(self, *arguments)
        if self.on_prefix is not None and isinstance(result, Prefix):
            self.on_prefix(result)
        return result

    return call  # type: ignore[return-value]  # wraps keeps the signature
