"""Timing of prefill and decoding, for the verb ``benchmark`` and for the scripts in ``benchmarks``."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.batch import CAPACITY_STEP
from grinqh_jax.decoding.dial import layer_shares
from grinqh_jax.decoding.engine import Thresholds
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.statistics import grading_fields
from grinqh_jax.decoding.thresholds import StackedThresholds, stacked_tables, thresholds_at
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names
from pallas_kernels.layout import round_up

SETTLING_RUNS = 8
"""Most runs that look for the setting with which a run reads the bits that are wanted."""

SETTLED_BITS = 0.01
"""Distance from the wanted mean that needs no further run."""

WARM_UP_RUNS = 3
"""Runs before the clock. The first compiles; on a GPU the two after it still take up to half as long again as
later ones (``benchmarks/notes``, entry D13)."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Tokens per second over several runs, none of them a program's first."""

    tokens: int
    seconds: tuple[float, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each run."""
        return [self.tokens / s for s in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Standard deviation, 0 for a single run."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


def timed(function: Callable[[], object], tokens: int, repeats: int) -> Timing:
    """Times ``repeats`` calls after ``WARM_UP_RUNS`` that are not counted; each is waited for."""
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
    """Times ``repeats`` calls as decode chunks follow one another: each is made while the one before it runs.

    Equals ``timed`` if the policy, by default that of the device, has no chunks ahead.
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


def filled_cache(config: ModelConfig, context: int, room: int, dtype) -> KVCache:
    """A cache of one sequence with ``context`` random positions and room for ``room`` more."""
    cache = KVCache.create(config, 1, round_up(context + room, CAPACITY_STEP), dtype)
    fill = jax.jit(lambda key, a: jax.random.normal(key, a.shape, a.dtype))
    arrays, structure = jax.tree.flatten((cache.keys, cache.values))
    keys, values = jax.tree.unflatten(structure, [fill(jax.random.key(i), a) for i, a in enumerate(arrays)])
    return KVCache(keys, values, jnp.full(1, context, jnp.int32))


class DecodeRun:
    """Repeated greedy decoding of ``tokens`` tokens after ``context`` ones, compiled once.

    Attributes:
      context: tokens before the first one; may be changed from run to run, up to what it was at first.
      compiled: the executable; ``compiled.as_text()`` is the optimized HLO.
    """

    def __init__(self, model: Decoder, context: int, tokens: int):
        self.model, self.context, self.tokens = model, context, tokens
        self._policy = DecodePolicy.for_device()
        self._flat = engine.FlatModel(model)
        self._cache = filled_cache(model.config, context, tokens, model.compute_dtype)
        self._start = jnp.zeros(1, jnp.int32), jnp.zeros(1, bool)
        self._rest = (
            Sampling.create(1),
            jnp.full(1, -1, jnp.int32),  # no token stops it
            jnp.full(1, tokens, jnp.int32),
        )
        self.compiled = None

    def run(self, thresholds: Thresholds | None) -> engine.Chunk:
        """Decodes the tokens once. The thresholds may change from run to run: nothing recompiles."""
        lengths = jnp.full(1, self.context, jnp.int32)
        cache = dataclasses.replace(self._cache, lengths=lengths)
        args = (self._flat, *self._start, cache, thresholds, *self._rest)
        if self.compiled is None:
            lowered = engine.jitted_decode_chunk.lower(*args, steps=self.tokens, policy=self._policy)
            self.compiled = lowered.compile()
        chunk, self._cache = self.compiled(*args)
        return chunk

    def settled(self, targets: Sequence[float], bits: float) -> Thresholds:
        """Thresholds with which the run reads the mean that is wanted, as the dial finds them in a long text.

        The text of a run, and so what it reads, is not the same at another setting: several are tried, each
        off by what the last one read too much, and the one that comes nearest is taken.

        Args:
          targets: of the model's threshold tables.
          bits: the mean that is wanted.
        """
        names, tables = linear_names(self.model.config), stacked_tables(self.model)
        shares, setting, found = layer_shares(self.model.config), bits, []
        for _ in range(SETTLING_RUNS):
            here = np.array([setting], np.float32)
            thresholds = thresholds_at(names, tables, jnp.asarray(targets, jnp.float32), here)
            excess = float(np.mean(np.asarray(self.run(thresholds).grading_stats.bits) @ shares)) - bits
            found.append((abs(excess), thresholds))
            if abs(excess) <= SETTLED_BITS:
                break
            setting = float(np.clip(setting - excess, targets[0], targets[-1]))
        return min(found, key=lambda pair: pair[0])[1]

    def figures(self, chunk: engine.Chunk) -> dict:
        """Returns realised bits and bytes of weights per token (see ``statistics.Statistics``)."""
        stats = jax.tree.map(lambda steps: np.asarray(steps)[:, 0], chunk.grading_stats)
        fields = grading_fields(self.model, stats)
        return {name: fields[name] for name in ("realised_bits", "bytes_per_token", "bytes_per_token_bf16")}

    def cache_bytes(self) -> int:
        """Bytes of keys and values that a step reads, at the mean length of the run."""
        config = self.model.config
        width = 2 * config.num_kv_heads * config.head_dim * self.model.compute_dtype.itemsize
        return round(config.num_layers * width * (self.context + self.tokens / 2))


class PrefillRun:
    """Repeated prefill of a prompt of ``tokens`` random tokens, ``chunk`` at a time.

    As in generating, a graded model's includes the preview of what grading takes of the prompt (not what the
    dial makes of it on the host).
    """

    def __init__(self, model: Decoder, tokens: int, chunk: int | None = None):
        self.model, self.tokens, self.chunk = engine.FlatModel(model), tokens, min(chunk or tokens, tokens)
        if tokens % self.chunk:
            raise ValueError(f"{tokens} tokens are not whole chunks of {self.chunk}")
        self._cache = KVCache.create(model.config, 1, tokens, model.compute_dtype)
        self._prompt = jax.random.randint(jax.random.key(0), (1, tokens), 0, model.config.vocab_size)
        self._program, self._thresholds = engine.prefill, ()
        if model.graded:
            names = tuple(linear_names(model.config))
            planes = model.linear(names[0]).weight.num_planes
            self._program = engine.prefill_with_preview
            self._thresholds = (StackedThresholds(jnp.zeros((1, len(names), planes)), names),)
        self.compiled = None

    def run(self) -> jax.Array:
        """Reads the prompt once; the logits after it."""
        cache = dataclasses.replace(self._cache, lengths=jnp.zeros(1, jnp.int32))
        for start in range(0, self.tokens, self.chunk):
            piece = self._prompt[:, start : start + self.chunk]
            args = (self.model, piece, jnp.full(1, self.chunk, jnp.int32), cache, *self._thresholds)
            if self.compiled is None:
                self.compiled = self._program.lower(*args).compile()
            logits, cache, *_ = self.compiled(*args)
        self._cache = cache
        return logits


def read_bandwidth(repeats: int = 20) -> float:
    """Bytes per second at which the device sums float32: what it reads at most, by the clock."""
    accelerator = jax.default_backend() != "cpu"
    data = jnp.ones((1 << 30 if accelerator else 1 << 24,), jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(data))
    start = time.perf_counter()
    jax.block_until_ready([total(data) for _ in range(repeats)])
    return repeats * data.nbytes / (time.perf_counter() - start)
