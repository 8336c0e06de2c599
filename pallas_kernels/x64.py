"""Switches JAX's 64-bit types off while this code runs, because it relies on int32 and float32 defaults.

The program that uses this library may have switched them on (``JAX_ENABLE_X64=1`` or
``jax.config.update("jax_enable_x64", True)``).
"""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def without_x64(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function or a generator function, so that it runs with 64-bit types switched off."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def iterate(*args: P.args, **kwargs: P.kwargs):
            iterator = function(*args, **kwargs)
            try:
                while True:
                    with jax.enable_x64(False):  # Left before yield: the consumer keeps its own setting.
                        try:
                            item = next(iterator)
                        except StopIteration:
                            return
                    yield item
            finally:
                iterator.close()

        return iterate

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return call
