"""Compiles the programs of prefill and decoding before they run, several at once or in the background.

XLA takes seconds to compile a program and releases Python's lock meanwhile, so threads compile several at
once. A program is lowered from the shapes of its arguments alone. ``jit`` keeps the compiled program and uses
it when the function is called.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.flat_model import FlatModel

Lowering = Callable[[], jax.stages.Lowered]
"""Function that traces and lowers a program."""


THREAD_NAME = "compile"
"""Name of the threads that compile programs."""


class Programs:
    """The programs of a model that are compiled or being compiled. Several threads may use it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._futures: dict[Hashable, concurrent.futures.Future[None]] = {}
        self._seen: set[Hashable] = set()

    def is_first(self, key: Hashable) -> bool:
        """Returns whether this is the first call with ``key``."""
        with self._lock:
            first = key not in self._seen
            self._seen.add(key)
        return first

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

    def _compile(self, key: Hashable, lowered: jax.stages.Lowered, future: concurrent.futures.Future) -> None:
        try:
            lowered.compile()
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


@dataclasses.dataclass(frozen=True)
class Signature:
    """Everything that the programs of a batch depend on, except the sizes of prefill bucket and cache.

    Attributes:
      model: Graded or dense model.
      flat_model: The same model as the programs receive it.
      batch: Number of rows.
      dial: Dial of all rows, on the device of the model; None for a dense model.
      sampling: Sampling parameters of each row.
      stop_tokens: int32 ``[E]``.
      policy: Policy that the decode loop is compiled for.
    """

    model: Decoder
    flat_model: FlatModel
    batch: int
    dial: Dial | None
    sampling: Sampling
    stop_tokens: jax.Array
    policy: DecodePolicy

    def prefill(self, widths: Iterable[int], capacity: int) -> dict[Hashable, Lowering]:
        """Returns the lowering of the prefill for each bucket width and a cache of ``capacity`` slots."""
        return {
            ("prefill", width, *self.key(capacity)): functools.partial(self._lower_prefill, width, capacity)
            for width in widths
        }

    def decode(self, capacity: int) -> dict[Hashable, Lowering]:
        """Returns the lowering of a decode chunk with a cache of ``capacity`` slots."""
        key = ("decode", len(self.stop_tokens), *self.key(capacity))
        return {key: functools.partial(self._lower_decode, capacity)}

    def key(self, capacity: int) -> tuple:
        """Returns the sizes and static arguments that all programs of the batch depend on."""
        optional = self.sampling.penalties is None, self.sampling.logit_bias is None
        return self.batch, capacity, self.policy, self.sampling.greedy, optional

    def _lower_prefill(self, width: int, capacity: int) -> jax.stages.Lowered:
        tokens = np.zeros((self.batch, width), np.int32)
        arguments = (self.flat_model, tokens, self._array(jnp.int32), self._cache(capacity))
        if self.dial is None:
            return _PREFILL.lower(*arguments)
        return _PREFILL_WITH_PREVIEW.lower(*arguments, self.dial.thresholds)

    def _lower_decode(self, capacity: int) -> jax.stages.Lowered:
        integers, history = self._array(jnp.int32), None
        if self.sampling.penalties is not None:
            one = jax.eval_shape(lambda: TokenHistory.of([[0]], self.model.config.vocab_size))
            history = jax.tree.map(lambda leaf: self._array(leaf.dtype, *leaf.shape[1:]), one)
        return engine.jitted_decode_chunk.lower(
            self.flat_model,
            integers,
            self._array(jnp.bool_),
            self._cache(capacity),
            self.dial,
            self.sampling,
            self.stop_tokens,
            integers,
            steps=self.policy.chunk_steps,
            policy=self.policy,
            history=history,
            top_logprobs=None,
        )

    def _array(self, dtype, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = self.model.norm.scale[...].sharding
        return jax.ShapeDtypeStruct((self.batch, *shape), dtype, sharding=sharding)

    def _cache(self, capacity: int) -> KVCache:
        config, dtype = self.model.config, self.model.compute_dtype
        create = functools.partial(KVCache.create, config, self.batch, capacity, dtype)
        return jax.tree.map(lambda leaf: self._array(leaf.dtype, *leaf.shape[1:]), jax.eval_shape(create))


_PREFILL, _PREFILL_WITH_PREVIEW = engine.prefill, engine.prefill_with_preview
