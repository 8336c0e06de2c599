"""Times prefill and decoding, for the verb ``benchmark`` and the scripts in ``benchmarks``."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial, layer_shares
from grinqh_jax.decoding.engine.chunk import jitted_decode_chunk
from grinqh_jax.decoding.generator import CAPACITY_STEP
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.statistics import grading_fields
from grinqh_jax.decoding.thresholds import StackedThresholds, Thresholds
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.fixed_states import fixed_bytes, whole_layers
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import put, zeros_on_mesh
from pallas_kernels.layout import round_up

SETTLING_RUNS = 8
"""Largest number of runs that ``DecodeRun.settle`` tries."""

SETTLED_BITS = 0.01
"""Difference from the target mean at which ``DecodeRun.settle`` stops."""

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


class DecodeRun:
    """Greedy decoding of ``tokens`` tokens in each of ``batch`` rows, repeatable, compiled once.

    The rows start with different tokens and different random keys and values, so they read different levels.

    Attributes:
      batch: Number of rows.
      context: Number of tokens in the cache before the run. May be set between runs, up to its first value.
      level: Level at which all rows read all input channels (``reading.batch_level``); None for grading. May
        be set between runs.
      compiled: The executable of the last run; None before the first run. ``compiled.as_text()`` is the
        optimized HLO.
    """

    def __init__(self, model: Decoder, context: int, tokens: int, batch: int = 1):
        self.model, self.context, self.tokens, self.batch = model, context, tokens, batch
        self.level: int | None = None
        self._policy = DecodePolicy.for_device()
        self._flat = FlatModel(model)
        self._cache = filled_cache(model, context, tokens, batch)
        start = jnp.arange(batch, dtype=jnp.int32) % model.config.vocab_size, jnp.zeros(batch, bool)
        rest = (
            Sampling.create(batch),
            jnp.full(1, -1, jnp.int32),  # no stop token
            jnp.full(batch, tokens, jnp.int32),
        )
        self._start, self._rest = put((start, rest), model.partition)
        self.compiled: jax.stages.Compiled | None = None
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def run(self, thresholds: Dial | Thresholds | None) -> engine.Chunk:
        """Decodes the tokens of all rows once.

        Compiles one program for dials, one for fixed thresholds, and others for each level. Other values of
        dials and thresholds do not recompile.
        """
        args = self.compile(thresholds)
        assert self.compiled is not None, "the program is compiled"
        chunk, self._cache = self.compiled(*args)
        return chunk

    def compile(self, thresholds: Dial | Thresholds | None) -> tuple[Any, ...]:
        """Compiles the program of a run, unless it is compiled, and returns its arguments."""
        lengths = put(jnp.full(self.batch, self.context, jnp.int32), self.model.partition)
        cache = dataclasses.replace(self._cache, lengths=lengths)
        thresholds = put(thresholds, self.model.partition)
        args = (self._flat, *self._start, cache, thresholds, *self._rest)
        kind = jax.tree.structure(thresholds), self.level
        if kind not in self._compiled:
            static = {"steps": self.tokens, "policy": self._policy, "level": self.level}
            self._compiled[kind] = jitted_decode_chunk.lower(*args, **static).compile()
        self.compiled = self._compiled[kind]
        return args

    def settle(self, targets: Sequence[float], bits: float) -> Dial:
        """Returns a dial with which the run reads a mean of ``bits``, as it does over a long text.

        Each run starts with the excess that the dial observed in the runs before it. Another setting
        generates another text, so the bits read do not follow the setting exactly. The returned dial is the
        one whose run came closest to ``bits``. At a level the dial has no effect, and is returned as it is.

        Args:
          targets: Mean bits of the rows of the model's threshold tables.
          bits: Mean bits to read.
        """
        dial, shares = Dial.create(self.model, targets, [bits] * self.batch), layer_shares(self.model.config)
        if self.level is not None:
            return dial
        runs: list[tuple[float, Dial]] = []
        for _ in range(SETTLING_RUNS):
            chunk = self.run(dial)
            assert chunk.grading_stats is not None, "a graded run has statistics"
            assert chunk.dial is not None, "the dial set the thresholds"
            difference = abs(float(np.mean(np.asarray(chunk.grading_stats.bits) @ shares)) - bits)
            runs.append((difference, dial))
            if difference <= SETTLED_BITS:
                break
            dial = dial.with_state(chunk.dial.next_answer())
        return min(runs, key=lambda pair: pair[0])[1]

    def figures(self, chunk: engine.Chunk) -> dict:
        """Returns realised bits and bytes of weights per token (see ``statistics.Statistics``).

        Both are means over the rows. A row's bytes are what it would read alone; rows share what they read.
        """
        stats = jax.tree.map(
            lambda steps: np.asarray(steps).reshape(-1, *steps.shape[2:]), chunk.grading_stats
        )
        fields = grading_fields(self.model, stats)
        return {name: fields[name] for name in ("realised_bits", "bytes_per_token", "bytes_per_token_bf16")}

    def cache_bytes(self) -> int:
        """Returns the bytes that a row reads of its cache in a step, at the mean context of the run."""
        config = self.model.config
        width = 2 * config.num_kv_heads * config.head_dim * self.model.compute_dtype.itemsize
        dtype, capacity = self.model.compute_dtype, self._cache.capacity
        whole = whole_layers(config, capacity) * width * (self.context + self.tokens / 2)
        return round(whole) + fixed_bytes(config, dtype, capacity)


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
