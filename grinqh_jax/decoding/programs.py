"""Compiles the programs of prefill and decoding before they run, several at once or in the background.

XLA takes seconds to compile a program and releases Python's lock meanwhile, so threads compile several at
once. A program is lowered from the shapes of its arguments alone. ``jit`` keeps the compiled program and uses
it when the function is called.
"""

import concurrent.futures
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from grinqh_jax import memory

Lowering = Callable[[], jax.stages.Lowered]
"""Function that traces and lowers a program."""

LAUNCHED_ONE_BY_ONE = {"xla_gpu_graph_min_graph_size": 1 << 30}
"""XLA's options for a program that runs once for each prompt: no command buffers (CUDA graphs) on a GPU.

A command buffer holds the addresses of all arrays. If one of them differs from that of the last run, XLA
updates every launch, which takes the host longer than the launches themselves, and the device waits for it.
While answers come and go, the arrays of a prompt have other addresses nearly every time. Decode chunks repeat
the same launches in a loop, and have command buffers.
"""

THREAD_NAME = "compile"
"""Name of the threads that compile programs."""

AT_ONCE = os.cpu_count() or 1
"""Number of programs that are compiled at once. More take no less time, but the memory of each: LLVM holds
hundreds of megabytes for a program of a CPU, and glibc keeps most of them when they are freed."""

LONG_SECONDS = 1.0
"""Seconds of a compilation after which the process gives back what it freed, which takes 0.1 to 0.6 s."""


class Programs:
    """The programs of a model that are compiled or being compiled. Several threads may use it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._futures: dict[Hashable, concurrent.futures.Future[None]] = {}

    def compile(self, lowerings: Mapping[Hashable, Lowering]) -> None:
        """Compiles those programs that are not compiled yet, several at once, and waits for all of them.

        Args:
          lowerings: Lowering of each program, by a key that no other program of the model has.
        """
        waiting = {}
        with self._lock:
            for key in lowerings:
                if key not in self._futures:
                    waiting[key] = self._futures[key] = concurrent.futures.Future()
            wanted = [self._futures[key] for key in lowerings]
        try:
            while waiting:
                key = next(iter(waiting))
                # This thread lowers the program, because tracing holds Python's lock and depends on settings
                # of the thread.
                compile = functools.partial(self._compile, key, lowerings[key](), waiting.pop(key))
                if waiting:
                    in_background(compile)
                else:
                    compile()
        except BaseException as error:
            for key, future in waiting.items():
                self._fail(key, future, error)
            raise
        for future in wanted:
            future.result()

    def _compile(self, key: Hashable, lowered: Any, future: concurrent.futures.Future) -> None:
        try:
            with self._slots:
                start = time.monotonic()
                lowered.compile()
                if time.monotonic() - start > LONG_SECONDS:
                    memory.give_back_freed_memory()
        except BaseException as error:  # The threads that wait for the program raise it.
            self._fail(key, future, error)
        else:
            future.set_result(None)

    def _fail(self, key: Hashable, future: concurrent.futures.Future, error: BaseException) -> None:
        with self._lock:
            self._futures.pop(key, None)
        future.set_exception(error)


def in_background(compile: Callable[[], None]) -> None:
    """Runs a function that compiles programs in a thread. Calls that need a program raise its errors."""

    def run() -> None:
        with contextlib.suppress(Exception):
            compile()

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()


def compiling() -> bool:
    """Whether a thread is compiling a program. It may crash if the process ends meanwhile."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())
