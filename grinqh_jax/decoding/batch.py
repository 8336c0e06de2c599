"""The host's side of decoding: turns a batch of prompts into tokens, decode chunk by decode chunk.

``Decoding`` keeps the KV cache between calls of the engine, cuts prompts into prefill buckets, and can
compile its programs in advance, so that times do not include compilation. On a GPU the next decode chunk runs
while the host processes the current one.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.model_files import prompt_too_long
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.prefill_buckets import cut, cut_conversation, first_previewed
from grinqh_jax.decoding.programs import Lowering, Programs, Signature
from grinqh_jax.decoding.prompt_cache import PromptCache, conversation_capacity
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.errors import UsageError
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from pallas_kernels import GradingStats
from pallas_kernels.layout import round_up

CAPACITY_STEP = 256
"""Cache capacities are multiples of this, or the whole context, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens of one decode chunk, or the first tokens, on the host.

    Attributes:
      tokens: New tokens of each row, possibly none.
      grading_stats: numpy, ``[steps, B, linears]``; row b is valid for its ``len(tokens[b])`` steps. None for
        the first tokens, which a full-precision prefill yields, and for dense models.
      seconds: Time that the model took, without the time that the consumer took between two chunks.
    """

    tokens: list[list[int]]
    grading_stats: GradingStats | None
    seconds: float


@dataclasses.dataclass
class _DeviceState:
    """Arguments of the next decode chunk, on the device. They include the results of chunks in flight.

    Attributes:
      cache: Keys and values of all tokens but the last.
      last: int32 ``[B]``, last token of each row.
      done: bool ``[B]``, rows that generate nothing further.
      limits: int32 ``[B]``, number of tokens that each row may still generate.
      history: Tokens that each row has; None without penalties.
      dial: Dial of all rows; None for a dense model.
    """

    cache: KVCache
    last: Int[jax.Array, "b"]
    done: Bool[jax.Array, "b"]
    limits: Int[jax.Array, "b"]
    history: TokenHistory | None
    dial: Dial | None


@dataclasses.dataclass
class _HostState:
    """The rows as the host knows them, from the decode chunks that have arrived.

    Attributes:
      tokens_left: int ``[B]``, number of tokens that each row may still generate.
      ended: bool ``[B]``, rows that met a stop token or their limit.
      stopped: bool ``[B]``, rows that the consumer has stopped.
    """

    tokens_left: Int[np.ndarray, "b"]
    ended: Bool[np.ndarray, "b"]
    stopped: Bool[np.ndarray, "b"]

    def may_generate(self, after: int = 0) -> bool:
        """Returns whether any row may still generate, after ``after`` more tokens per row."""
        return bool(np.any(~self.ended & ~self.stopped & (self.tokens_left > after)))


@dataclasses.dataclass(frozen=True)
class _ChunkInFlight:
    """A decode chunk that the device may still be working on.

    Attributes:
      asked: Time at which the consumer asked for it.
      result: The chunk as numpy arrays, and the time at which it arrived.
    """

    asked: float
    result: concurrent.futures.Future[tuple[engine.Chunk, float]]


class Decoding:
    """Generates a continuation of every prompt of a batch.

    Attributes:
      reused_tokens: Number of leading prompt tokens taken from the prompt cache.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        max_context: int,
        dial: Dial | None,
        sampling: Sampling,
        stop_tokens: Sequence[int] = (),
        programs: Programs | None = None,
        policy: DecodePolicy | None = None,
        prompt_cache: PromptCache | None = None,
    ):
        """Prepares the batch and reads no token yet.

        Args:
          model: Graded model; or a dense one, with ``dial=None``.
          prompts: Tokens of each row, at least one.
          max_tokens: Most tokens to generate per row; fewer if the context ends first.
          max_context: Most tokens of prompt and continuation together.
          dial: Dial of all rows, as it is before the prompts.
          sampling: Sampling parameters of each row.
          stop_tokens: Tokens that end a row. They are part of the result.
          programs: Programs that earlier batches of the same model have compiled; updated in place.
          policy: How programs are compiled and chunks scheduled, by default ``DecodePolicy.for_device()``.
          prompt_cache: Keys and values of an earlier prompt to reuse; keeps those of this one. For a single
            prompt.

        Raises:
          UsageError: A prompt is empty or leaves no room in the context, or the prompt cache belongs to
            another model.
          ValueError: There is a prompt cache and more than one prompt.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        if lengths.min() < 1:
            raise UsageError("a prompt has no tokens; give at least one")
        if lengths.max() >= max_context:
            raise prompt_too_long(int(lengths.max()), max_context)
        if prompt_cache is not None and len(prompts) > 1:
            raise ValueError(f"a prompt cache serves one prompt, not {len(prompts)}")
        self._flat_model = engine.FlatModel(model)
        self._prompts = prompts
        self._sampling = sampling
        self._stop_tokens = stop_array(stop_tokens)
        self._programs = Programs() if programs is None else programs
        self._policy = policy or DecodePolicy.for_device()
        # All inputs and outputs of the loop have the sharding of the (replicated) norm from the start,
        # because jit compiles again for the same shapes with another sharding.
        self._sharding = model.norm.scale[...].sharding
        batch, tokens_left = len(prompts), np.minimum(max_tokens, max_context - lengths)
        needed = int(np.max(lengths + tokens_left))
        few_sizes = prompt_cache is not None and prompt_cache.few_sizes
        capacity = conversation_capacity(needed) if few_sizes else round_up(needed, CAPACITY_STEP)
        capacity = min(capacity, max_context)
        self._prompt_cache, self.reused_tokens = prompt_cache, 0
        if prompt_cache is None:
            cache = self._put(KVCache.create(model.config, batch, capacity, model.compute_dtype))
        else:
            read_from = len(prompts[0]) - 1 if dial is None else first_previewed(len(prompts[0]))
            cache, self.reused_tokens = prompt_cache.acquire(self, model, prompts[0], capacity, read_from)
        self._host = _HostState(tokens_left, ended=np.ones(batch, bool), stopped=np.zeros(batch, bool))
        self._device = _DeviceState(
            cache,
            last=self._put(np.zeros(batch, np.int32)),
            done=self._put(self._host.ended),
            limits=self._put(np.zeros(batch, np.int32)),
            history=None
            if sampling.penalties is None
            else self._put(TokenHistory.of(prompts, model.config.vocab_size)),
            dial=self._put(dial),
        )
        self._signature = Signature(
            model, self._flat_model, batch, self._device.dial, sampling, self._stop_tokens, self._policy
        )
        cut_prompts = (
            functools.partial(cut_conversation, prompts[0]) if few_sizes else functools.partial(cut, prompts)
        )
        self._buckets = list(cut_prompts(self.reused_tokens))

    def compile(self) -> None:
        """Compiles the programs of ``prefill`` and ``chunks`` that are new, several at once."""
        decodes = bool(np.any(self._host.tokens_left > 1))
        decode = self._signature.decode(self._device.cache.capacity) if decodes else {}
        self._programs.compile(self._prefill_lowerings() | decode)
        self.compile_prefill()
        if decodes:
            self.compile_decode()

    def compile_prefill(self) -> None:
        """Compiles the programs of ``prefill`` that are new."""
        self._programs.compile(self._prefill_lowerings())
        if self._programs.is_first(("small", *self._signature.key(self._device.cache.capacity))):
            self._compile_small()

    def compile_decode(self) -> None:
        """Compiles the program of ``chunks`` if it is new, and decodes no tokens with it."""
        capacity = self._device.cache.capacity
        self._programs.compile(self._signature.decode(capacity))
        if self._programs.is_first(("limits", *self._signature.key(capacity))):
            chunk = self._decode(self._put(np.zeros(len(self._prompts), np.int32)))
            (self._device.limits - chunk.counts).block_until_ready()

    def _prefill_lowerings(self) -> dict[Hashable, Lowering]:
        widths = sorted({bucket.tokens.shape[1] for bucket in self._buckets})
        return self._signature.prefill(widths, self._device.cache.capacity)

    def _compile_small(self) -> None:
        """Compiles the small programs that run after a prefill, by running them on zeros."""
        batch, config = len(self._prompts), self._signature.model.config
        zeros, preview = self._put(np.zeros((batch, config.vocab_size), np.float32)), None
        if self._device.dial is not None:
            bits = jnp.zeros((batch, engine.PREVIEW_TOKENS, len(self._device.dial.names)))
            preview = self._put(engine.Preview(bits, jnp.zeros(batch, jnp.int32)))
            preview = engine.merge_previews(preview, preview)
        none = self._put(np.zeros((batch, 1), bool))
        jax.block_until_ready((self._first_tokens(zeros, preview), jnp.where(none, zeros, zeros)))

    def prefill(self) -> NewTokens:
        """Reads the prompts and chooses the first token of each row, at full precision.

        The dial observes the preview of the end of each prompt.
        """
        started = time.perf_counter()
        logits: Float[jax.Array, "b v"] | None = None
        preview: engine.Preview | None = None
        for bucket in self._buckets:
            new_logits, new_preview = self._read(bucket.tokens, self._put(bucket.lengths))
            if self._prompt_cache is not None:
                self._prompt_cache.store(self, self._device.cache, self._prompts[0][: bucket.end])
            is_read = (bucket.lengths > 0)[:, None]
            logits = new_logits if logits is None else jnp.where(is_read, new_logits, logits)
            preview = new_preview if preview is None else engine.merge_previews(preview, new_preview)
        assert logits is not None, "every prompt has a token to read"
        self._device.last, self._device.history, self._device.dial = self._first_tokens(logits, preview)
        first = np.asarray(self._device.last)
        self._host.tokens_left -= 1
        self._host.ended = np.isin(first, np.asarray(self._stop_tokens)) | (self._host.tokens_left <= 0)
        self._device.done = self._put(self._host.ended)
        self._device.limits = self._put(self._host.tokens_left.astype(np.int32))
        return NewTokens([[int(token)] for token in first], None, time.perf_counter() - started)

    def chunks(self) -> Iterator[NewTokens]:
        """Decodes until every row is done.

        With chunks ahead, as on a GPU, one decode chunk runs while the consumer processes the previous one.
        ``stop`` then takes effect one chunk later.
        """
        steps = self._policy.chunk_steps
        in_flight: collections.deque[_ChunkInFlight] = collections.deque()
        reader = concurrent.futures.ThreadPoolExecutor(1)
        asked, arrived = time.perf_counter(), 0.0
        try:
            while True:
                while len(in_flight) <= self._policy.chunks_ahead and self._host.may_generate(
                    after=len(in_flight) * steps
                ):
                    in_flight.append(self._launch(asked, reader))
                if not self._host.may_generate():
                    return  # All rows of the chunks still in flight are done or stopped.
                current = in_flight.popleft()
                device_free = max(current.asked, arrived)
                chunk, arrived = current.result.result()
                new = self._receive(chunk, arrived - device_free)
                yield new
                asked = time.perf_counter()
        finally:
            reader.shutdown(wait=False)

    def stop(self, rows: Bool[np.ndarray, "b"]) -> None:
        """Ends rows, which then yield no further tokens."""
        self._host.stopped |= rows
        self._device.done |= jnp.asarray(rows)

    def _launch(self, asked: float, reader: concurrent.futures.Executor) -> _ChunkInFlight:
        """Dispatches a decode chunk, and its transfer to the host in a thread of ``reader``."""
        chunk = self._decode(self._device.limits)
        self._device.last, self._device.done = chunk.last, chunk.done
        self._device.limits = self._device.limits - chunk.counts
        self._device.history = chunk.history
        if self._device.dial is not None:
            assert chunk.dial is not None, "the dial sets the thresholds"
            self._device.dial = self._device.dial.with_state(chunk.dial)
        chunk = dataclasses.replace(chunk, history=None, dial=None)  # These two stay on the device.
        return _ChunkInFlight(asked, reader.submit(_to_host, chunk))

    def _receive(self, chunk: engine.Chunk, seconds: float) -> NewTokens:
        """Updates the host's state from a chunk that has arrived, and drops tokens of stopped rows."""
        counts = np.where(self._host.stopped, 0, chunk.counts)
        self._host.tokens_left, self._host.ended = self._host.tokens_left - counts, np.asarray(chunk.done)
        # Cut on the host, because on the device every count would compile another program.
        stats = jax.tree.map(lambda steps: steps[: counts.max()], chunk.grading_stats)
        tokens = [row[:count].tolist() for row, count in zip(chunk.tokens, counts, strict=True)]
        return NewTokens(tokens, stats, seconds)

    def _read(
        self, tokens: Int[np.ndarray, "b t"], lengths: Int[jax.Array, "b"]
    ) -> tuple[Float[jax.Array, "b v"], engine.Preview | None]:
        """Reads a prefill bucket; returns its logits and preview."""
        cache, preview = self._owned_cache(), None
        if self._device.dial is None:
            logits, cache = engine.prefill(self._flat_model, tokens, lengths, cache)
        else:
            logits, cache, preview = engine.prefill_with_preview(
                self._flat_model, tokens, lengths, cache, self._device.dial.thresholds
            )
        self._keep_cache(cache)
        return logits, preview

    def _decode(self, limits: Int[jax.Array, "b"]) -> engine.Chunk:
        """Dispatches a decode chunk of at most ``limits`` tokens per row."""
        chunk, cache = engine.decode_chunk(
            self._flat_model,
            self._device.last,
            self._device.done,
            self._owned_cache(),
            self._device.dial,
            self._sampling,
            self._stop_tokens,
            limits,
            steps=self._policy.chunk_steps,
            policy=self._policy,
            history=self._device.history,
        )
        self._keep_cache(cache)
        return chunk

    def _first_tokens(self, logits: Float[jax.Array, "b v"], preview: engine.Preview | None):
        return engine.first_tokens(
            logits,
            preview,
            self._device.cache.lengths,
            self._sampling,
            self._device.history,
            self._device.dial,
            policy=self._policy,
        )

    def _owned_cache(self) -> KVCache:
        """Returns the cache, if no later generation has acquired it."""
        if self._prompt_cache is not None:
            self._prompt_cache.check(self)
        return self._device.cache

    def _keep_cache(self, cache: KVCache) -> None:
        self._device.cache = cache
        if self._prompt_cache is not None:
            self._prompt_cache.store(self, cache)

    def _put(self, arrays):
        """Puts arrays on the device with the sharding of the loop."""
        return jax.device_put(arrays, self._sharding)


def stop_array(stop_tokens: Sequence[int]) -> Int[jax.Array, "e"]:
    """Returns the stop tokens on the device. If there are none, returns a number that is no token."""
    return jnp.array(tuple(stop_tokens) or (-1,), jnp.int32)


def _to_host(chunk: engine.Chunk) -> tuple[engine.Chunk, float]:
    """Fetches a chunk as numpy arrays, all in one transfer; returns it and the time of its arrival."""
    return jax.device_get(chunk), time.perf_counter()
