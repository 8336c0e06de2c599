"""Keeps JAX's 64-bit types out of this code, which counts on int32 and float32 defaults.

A program may switch them on for itself (``JAX_ENABLE_X64=1``, ``jax.config.update("jax_enable_x64", True)``).
"""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def without_x64(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public function or a generator function: it runs with 64-bit types switched off."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def iterate(*args: P.args, **kwargs: P.kwargs):
            iterator = function(*args, **kwargs)
            try:
                while True:
                    with jax.enable_x64(False):  # not while the consumer has control
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
