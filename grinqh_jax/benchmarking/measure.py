"""Times prefill and decoding, for the verb ``benchmark`` and the scripts in ``benchmarks``."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.generator import CAPACITY_STEP
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.thresholds import StackedThresholds
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import put, zeros_on_mesh
from pallas_kernels.layout import round_up

WARM_UP_RUNS = 3
"""Number of runs before timing starts. The first one compiles. On a GPU, the next two take up to 1.5 times as
long as later ones (``benchmarks/notes``, entry D13)."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of several warm runs.

    Attributes:
      tokens: Tokens per run.
      seconds: Duration of each run.
    """

    tokens: int
    seconds: tuple[float, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each run."""
        return [self.tokens / s for s in self.seconds]

    @property
    def mean(self) -> float:
        """Mean of ``rates``."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Standard deviation of ``rates``; 0 for a single run."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


def timed(function: Callable[[], object], tokens: int, repeats: int) -> Timing:
    """Times ``repeats`` calls after ``WARM_UP_RUNS`` calls. Waits for each call before the next one.

    Args:
      function: Function to time; returns JAX arrays.
      tokens: Tokens that one call processes.
      repeats: Number of timed calls.
    """
    _warm_up(function)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return Timing(tokens, tuple(seconds))


def timed_in_a_row(
    function: Callable[[], object], tokens: int, repeats: int, policy: DecodePolicy | None = None
) -> Timing:
    """Times ``repeats`` calls, each dispatched while the previous one runs, as decoding dispatches chunks.

    Args:
      function: Function to time; returns JAX arrays.
      tokens: Tokens that one call processes.
      repeats: Number of timed calls.
      policy: Decode policy, by default that of the device. Without ``chunks_ahead``, this is ``timed``.
    """
    if not (policy or DecodePolicy.for_device()).chunks_ahead:
        return timed(function, tokens, repeats)
    _warm_up(function)
    ends, running = [], function()
    for _ in range(repeats + 1):
        following = function()
        jax.block_until_ready(running)
        ends.append(time.perf_counter())
        running = following
    jax.block_until_ready(running)
    return Timing(tokens, tuple(end - start for start, end in itertools.pairwise(ends)))


def _warm_up(function: Callable[[], object]) -> None:
    for _ in range(WARM_UP_RUNS):
        jax.block_until_ready(function())


def empty_cache(model: Decoder, batch: int, capacity: int) -> KVCache:
    """Returns an empty cache for a model, on the devices of its mesh if it is on one."""
    create = functools.partial(KVCache.create, model.cache_config, batch, capacity, model.compute_dtype)
    return zeros_on_mesh(create, model.partition)


def filled_cache(model: Decoder, context: int, room: int, batch: int = 1) -> KVCache:
    """Returns a cache of ``batch`` rows with ``context`` random positions and space for ``room`` more."""
    cache = empty_cache(model, batch, round_up(context + room, CAPACITY_STEP))
    arrays, structure = jax.tree.flatten((cache.keys, cache.values, cache.fixed))
    fill = {
        sharding: jax.jit(lambda key, a: jax.random.normal(key, a.shape, a.dtype), out_shardings=sharding)
        for sharding in {a.sharding for a in arrays}
    }
    filled = [fill[a.sharding](jax.random.key(i), a) for i, a in enumerate(arrays)]
    keys, values, fixed = jax.tree.unflatten(structure, filled)
    lengths = jnp.full(batch, context, jnp.int32)
    return dataclasses.replace(cache, keys=keys, values=values, lengths=lengths, fixed=fixed)


class PrefillRun:
    """Prefill of a prompt of ``tokens`` random tokens in buckets of ``bucket`` tokens, repeatable.

    As in generation, the prefill of a graded model includes the preview, which estimates the bits that
    grading reads. The update of the dial is not included.

    Attributes:
      bucket: Tokens per call.
      compiled: The executable; None before the first run.
    """

    def __init__(self, model: Decoder, tokens: int, bucket: int | None = None):
        self.model, self.tokens, self.bucket = FlatModel(model), tokens, min(bucket or tokens, tokens)
        if tokens % self.bucket:
            raise ValueError(
                f"{tokens} tokens are no multiple of the bucket of {self.bucket}; choose a divisor"
            )
        self._cache, self._partition = empty_cache(model, 1, tokens), model.partition
        self._prompt = jax.random.randint(jax.random.key(0), (1, tokens), 0, model.config.vocab_size)
        self._program: Any = engine.prefill
        self._thresholds: tuple[StackedThresholds, ...] = ()
        if model.graded:
            names = tuple(linear_names(model.config))
            planes = model.graded_linear(names[0]).weight.num_planes
            self._program = engine.prefill_with_preview
            self._thresholds = (StackedThresholds(jnp.zeros((1, len(names), planes)), names),)
        self.compiled: jax.stages.Compiled | None = None

    def run(self) -> jax.Array:
        """Reads the prompt once; returns the logits after it."""
        cache = dataclasses.replace(self._cache, lengths=jnp.zeros(1, jnp.int32))
        for start in range(0, self.tokens, self.bucket):
            tokens = self._prompt[:, start : start + self.bucket]
            rest = tokens, jnp.full(1, self.bucket, jnp.int32), cache, *self._thresholds
            args = (self.model, *put(rest, self._partition))
            if self.compiled is None:
                self.compiled = self._program.lower(*args).compile()
            logits, cache, *_ = self.compiled(*args)
        self._cache = cache
        return logits


def read_bandwidth(repeats: int = 20) -> float:
    """Returns the device's read bandwidth, bytes per second: the time by the clock of summing float32."""
    accelerator = jax.default_backend() != "cpu"
    data = jnp.ones((1 << 30 if accelerator else 1 << 24,), jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(data))
    start = time.perf_counter()
    jax.block_until_ready([total(data) for _ in range(repeats)])
    return repeats * data.nbytes / (time.perf_counter() - start)
