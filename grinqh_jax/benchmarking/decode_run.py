"""Times the decode chunks of the engine, for the verb ``benchmark`` and the scripts in ``benchmarks``."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from grinqh_jax.benchmarking.measure import filled_cache
from grinqh_jax.decoding.dial import Dial, DialState, layer_shares
from grinqh_jax.decoding.engine.chunk import Chunk, jitted_decode_chunk
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots import answers
from grinqh_jax.decoding.slots.settings import NO_TOKEN, Settings
from grinqh_jax.decoding.slots.state import DecodeState, Slots
from grinqh_jax.decoding.statistics import grading_fields, joined
from grinqh_jax.decoding.thresholds import Thresholds
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.fixed_states import fixed_bytes, whole_layers
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import put, shardings
from pallas_kernels import GradingStats
from pallas_kernels.layout import round_up

SETTLING_RUNS = 8
"""Largest number of runs that ``DecodeRun.settle`` tries."""

SETTLED_BITS = 0.01
"""Difference from the target mean at which ``DecodeRun.settle`` stops."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a run decoded.

    Attributes:
      chunks: Decode chunks of the run, in order.
      dial: State of the dial after the run; None without a dial.
    """

    chunks: list[Chunk]
    dial: DialState | None

    @property
    def tokens(self) -> Int[np.ndarray, "b tokens"]:
        """New tokens of each row."""
        return np.concatenate([np.asarray(chunk.tokens) for chunk in self.chunks], axis=1)

    @property
    def grading_stats(self) -> GradingStats | None:
        """Statistics of each decode step, numpy ``[tokens, b, linears]``; None for a dense model."""
        return joined([chunk.grading_stats for chunk in self.chunks if chunk.grading_stats is not None])


class DecodeRun:
    """Greedy decoding of ``tokens`` tokens in each of ``batch`` rows, repeatable, compiled once.

    The rows are those of an engine whose slots are all in use, and decode the engine's chunks
    (``slots.answers.generate``) of a contiguous cache. They start with different tokens and different random
    keys and values, so they read different levels.

    Attributes:
      batch: Number of rows.
      tokens: Number of tokens of each row, whole decode chunks.
      context: Number of tokens in the cache before the run. May be set between runs, up to its first value.
      level: Level at which all rows read all input channels (``reading.batch_level``); None for grading. May
        be set between runs.
      compiled: The executable of the last run, a decode chunk; None before the first run.
        ``compiled.as_text()`` is the optimized HLO.
    """

    def __init__(self, model: Decoder, context: int, tokens: int, batch: int = 1):
        """Makes a run.

        Args:
          model: Graded or dense model.
          context: Number of tokens in the cache before the run.
          tokens: Number of tokens of each row. It is raised to a multiple of the policy's ``chunk_steps``; a
            run of fewer tokens is one shorter chunk.
          batch: Number of rows.
        """
        policy = DecodePolicy.for_device()
        self._policy = dataclasses.replace(policy, chunk_steps=min(policy.chunk_steps, tokens))
        self.model, self.context, self.batch = model, context, batch
        self.tokens = round_up(tokens, self._policy.chunk_steps)
        self.level: int | None = None
        self._flat = FlatModel(model)
        self._cache = filled_cache(model, context, self.tokens, batch)
        self._settings = Settings(
            sampling=Sampling.on_host(batch),
            bits=self._rows(0, np.float32),  # not read after the first token
            stop_tokens=self._rows(NO_TOKEN, np.int32)[:, None],
            limits=self._rows(self.tokens, np.int32),
        )
        self.compiled: jax.stages.Compiled | None = None
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def run(self, thresholds: Dial | Thresholds | None) -> Decoded:
        """Decodes the tokens of all rows once.

        As in generation, at most ``chunks_ahead`` chunks of the policy are in flight while the host fetches
        the one before them. Compiles one program for dials, one for fixed thresholds, and others for each
        level. Other values of dials and thresholds do not recompile.
        """
        thresholds = put(thresholds, self.model.partition)
        state, chunks = self._start(thresholds), list[Chunk]()
        for i in range(self.tokens // self._policy.chunk_steps):
            state, chunk = self._decode(state, thresholds)
            chunks.append(chunk)
            if (arrived := i - self._policy.chunks_ahead) >= 0:
                chunks[arrived] = jax.device_get(chunks[arrived])
        cache, slots = state.cache, state.slots
        self._cache = dataclasses.replace(
            self._cache, keys=cache.keys, values=cache.values, fixed=slots.fixed
        )
        return Decoded(chunks, slots.dial)

    def compile(self, thresholds: Dial | Thresholds | None) -> None:
        """Compiles the program of a run, unless it is compiled."""
        thresholds = put(thresholds, self.model.partition)
        self._program(self._start(thresholds), thresholds)

    def lower(self, thresholds: Dial | Thresholds | None) -> Callable[[], None]:
        """Lowers the program of a run at ``level``; returns a function that compiles it, in any thread."""
        thresholds = put(thresholds, self.model.partition)
        key, program, args, options = self._call(self._start(thresholds), thresholds)
        lowered = program.lower(*args, **options)

        def compile_lowered() -> None:
            self._compiled[key] = lowered.compile()

        return compile_lowered

    def _start(self, thresholds: Dial | Thresholds | None) -> DecodeState:
        """Returns the state before the first token. Decode chunks donate it."""
        dial = None
        if isinstance(thresholds, Dial):  # A copy, because the caller uses the dial again.
            dial = jax.tree.map(np.asarray, thresholds.state)
        first: Any = np.arange(self.batch, dtype=np.int32) % self.model.config.vocab_size
        slots = Slots(
            settings=self._settings,
            pages=None,
            lengths=self._rows(self.context, np.int32),
            last=first,
            done=self._rows(False, bool),
            history=None,
            dial=dial,
            fixed={},
        )
        slots = dataclasses.replace(jax.device_put(slots, self._sharding(slots)), fixed=self._cache.fixed)
        return DecodeState(PagedCache(self._cache.keys, self._cache.values), slots)

    def _rows(self, value: Any, dtype: Any) -> Any:
        return np.full(self.batch, value, dtype)

    def _sharding(self, slots: Slots) -> Any:
        """Returns the shardings of the rows, which are those of all outputs of a chunk."""
        if self.model.partition is not None:
            return shardings(slots, self.model.partition)
        return self.model.norm.scale[...].sharding

    def _decode(self, state: DecodeState, thresholds: Dial | Thresholds | None) -> tuple[DecodeState, Chunk]:
        """Dispatches a chunk."""
        program, args = self._program(state, thresholds)
        first, second = program(*args)
        if not _are_fixed(thresholds):
            return first, second
        return DecodeState(PagedCache.of(second), state.slots.after(first, second)), first

    def _program(
        self, state: DecodeState, thresholds: Dial | Thresholds | None
    ) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
        """Returns the executable of ``_call`` and its arguments."""
        key, program, args, options = self._call(state, thresholds)
        if key not in self._compiled:
            self._compiled[key] = program.lower(*args, **options).compile()
        self.compiled = self._compiled[key]
        return self.compiled, args

    def _call(
        self, state: DecodeState, thresholds: Dial | Thresholds | None
    ) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
        """Returns a chunk of the engine, or, for fixed thresholds, one without a dial.

        Returns:
          The key of its executable, the jitted function, its arguments and its static arguments.
        """
        options: dict[str, Any] = {"policy": self._policy, "top_logprobs": None, "level": self.level}
        options["steps"] = self._policy.chunk_steps
        program: Any = answers.generate
        args: tuple[Any, ...] = (self._flat, state, thresholds)
        if _are_fixed(thresholds):
            slots, settings = state.slots, state.slots.settings
            cache = state.cache.texts(None, slots.lengths, slots.fixed)
            rest = slots.sampling(True, None), settings.stop_tokens, settings.limits
            args = (self._flat, slots.last, slots.done, cache, thresholds, *rest)
            program = jitted_decode_chunk
        else:
            options["greedy"] = True
        return (jax.tree.structure(thresholds), self.level), program, args, options

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
            decoded = self.run(dial)
            assert decoded.grading_stats is not None, "a graded run has statistics"
            assert decoded.dial is not None, "the dial set the thresholds"
            difference = abs(float(np.mean(np.asarray(decoded.grading_stats.bits) @ shares)) - bits)
            runs.append((difference, dial))
            if difference <= SETTLED_BITS:
                break
            dial = dial.with_state(decoded.dial.next_answer())
        return min(runs, key=lambda pair: pair[0])[1]

    def figures(self, decoded: Decoded) -> dict:
        """Returns realised bits and bytes of weights per token (see ``statistics.Statistics``).

        Both are means over the rows. A row's bytes are what it would read alone; rows share what they read.
        """
        stats = jax.tree.map(
            lambda steps: np.asarray(steps).reshape(-1, *steps.shape[2:]), decoded.grading_stats
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


def _are_fixed(thresholds: Dial | Thresholds | None) -> bool:
    return thresholds is not None and not isinstance(thresholds, Dial)
