"""The host's side of decoding: a batch of prompts in, tokens out in chunks.

It keeps the cache between calls of the engine, pads prompts to few lengths so that few programs are
compiled, and can compile them before any clock runs. A GPU has its next chunk before the host looks at one.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling, sample
from grinqh_jax.errors import UsageError
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from pallas_kernels.layout import round_up

SHORTEST_BLOCK, LONGEST_BLOCK = 32, 2048
"""Prompts are read in blocks of 32, 64, ... 2048 positions, the last one padded."""

CAPACITY_STEP = 256
"""Cache capacities are multiples of this, or the context itself."""

_first_token = jax.jit(sample, static_argnames="policy")


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What one chunk generated, on the host.

    Attributes:
      tokens: of each row, those generated; possibly none.
      grades: of each step and row, ``[steps, B, linears]``; None for the first token, which the
        prefill yields at full precision, and for dense models. Row b is valid for its
        ``len(tokens[b])`` steps.
      seconds: the model's time, the consumer's between two chunks not counted.
    """

    tokens: list[list[int]]
    grades: engine.Grades | None
    seconds: float


class Decoding:
    """Generates a continuation of every prompt of a batch."""

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
        compiled: set[tuple] | None = None,
        policy: DecodePolicy | None = None,
    ):
        """Prepares; no token is read yet.

        Args:
          model: graded; or dense, with ``dial=None``.
          prompts: tokens of each row, at least one.
          max_tokens: most tokens to generate per row; less where the context ends first.
          max_context: most tokens of prompt and text together.
          dial: of all rows; learns from what they read.
          sampling: of each row.
          stop_tokens: a row ends when it generates one of these, which is part of the result.
          compiled: which programs earlier batches of the same model have compiled, to be kept by the
            caller from batch to batch; none by default.
          policy: how programs are compiled and chunks scheduled, by default ``DecodePolicy.for_device()``.

        Raises:
          UsageError: a prompt is empty or leaves no room in the context.
        """
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) < 1:
            raise UsageError("a prompt has no tokens; give at least one")
        if max(lengths) >= max_context:
            raise UsageError(
                f"the prompt has {max(lengths)} tokens and the context holds {max_context}, the answer "
                "included; shorten the prompt or raise the context"
            )
        self._model = engine.FlatModel(model)
        self._prompts = prompts
        self._lengths = np.array(lengths)
        self._room = np.minimum(max_tokens, max_context - self._lengths)
        self._dial = dial
        self._thresholds = None if dial is None else dial.thresholds
        self._sampling = sampling
        self._policy = policy or DecodePolicy.for_device()
        self._stop_tokens = jnp.array(stop_tokens or (-1,), jnp.int32)
        needed = int(np.max(self._lengths + self._room))
        capacity = min(round_up(needed, CAPACITY_STEP), max_context)
        # Whatever goes in and out of the loop lives where the (replicated) norm does from the start: jit
        # compiles anew for arguments of the same shapes in another place.
        self._place = model.norm.scale[...].sharding
        cache = KVCache.create(model.config, len(prompts), capacity, model.compute_dtype)
        self._cache: KVCache = jax.device_put(cache, self._place)
        self._last: Int[jax.Array, "b"] = self._put(np.zeros(len(prompts), np.int32))
        self._done: Bool[jax.Array, "b"] = self._put(np.ones(len(prompts), bool))
        self._limits: Int[jax.Array, "b"] = self._put(np.zeros(len(prompts), np.int32))
        # What of this the host knows: rows that have ended, and those whose rest is of no interest.
        self._ended, self._stopped = np.ones(len(prompts), bool), np.zeros(len(prompts), bool)
        self._compiled = set() if compiled is None else compiled

    def compile_prefill(self) -> None:
        """Compiles what ``prefill`` needs, if it is new, by running it on no tokens at all."""
        batch, capacity = len(self._prompts), self._cache.capacity
        none = self._put(np.zeros(batch, np.int32))
        for width in sorted({block.shape[1] for block, _ in self._blocks()}):
            program = ("prefill", batch, width, capacity, self._policy, self._sampling.draws)
            if program in self._compiled:
                continue
            blank = np.zeros((batch, width), np.int32)
            logits, _ = self._read(blank, none)
            _first_token(logits, self._sampling, self._cache.lengths, policy=self._policy).block_until_ready()
            self._compiled.add(program)

    def compile_decode(self) -> None:
        """Compiles what ``chunks`` needs, if it is new and not every row is done after ``prefill``.

        It does so by decoding no tokens at all.
        """
        if self._ended.all():
            return
        sizes = len(self._prompts), self._cache.capacity, len(self._stop_tokens), self._policy
        program = ("decode", *sizes, self._sampling.draws)
        if program not in self._compiled:
            none = self._put(np.zeros(len(self._prompts), np.int32))
            (self._limits - self._decode(none).counts).block_until_ready()
            self._compiled.add(program)

    def prefill(self) -> NewTokens:
        """Reads the prompts and chooses the first token of each row, at full precision.

        From the end of each prompt the dial learns what its text takes.
        """
        started = time.perf_counter()
        following = preview = None
        for block, lengths in self._blocks():
            logits, seen = self._read(block, self._put(lengths))
            following = logits if following is None else jnp.where((lengths > 0)[:, None], logits, following)
            preview = seen if preview is None else engine.merge_previews(preview, seen)
        self._last = _first_token(following, self._sampling, self._cache.lengths, policy=self._policy)
        tokens, preview = jax.device_get((self._last, preview))
        if preview is not None:
            self._follow(preview.bits, preview.counts)
        self._room -= 1
        self._ended = np.isin(tokens, np.asarray(self._stop_tokens)) | (self._room <= 0)
        self._done, self._limits = self._put(self._ended), self._put(self._room.astype(np.int32))
        return NewTokens([[int(token)] for token in tokens], None, time.perf_counter() - started)

    def chunks(self) -> Iterator[NewTokens]:
        """Decodes until every row is done.

        On a GPU one chunk is under way while the consumer has the one before it: the dial follows, and rows
        are stopped, a chunk later.
        """
        under_way, ready = collections.deque(), 0.0
        observed = None  # what the dial is yet to follow
        reader = concurrent.futures.ThreadPoolExecutor(1)
        try:
            while True:
                started = time.perf_counter()
                if observed is not None:
                    self._follow(*observed)
                setting = None if self._dial is None else self._dial.setting
                while len(under_way) <= self._policy.chunks_ahead and self._goes_on(len(under_way)):
                    chunk = self._decode(self._limits)
                    self._last, self._done = chunk.last, chunk.done
                    self._limits = self._limits - chunk.counts
                    under_way.append((started, setting, reader.submit(_on_host, chunk)))
                if not self._goes_on(0):
                    return  # and what is under way is of no interest
                started, setting, result = under_way.popleft()
                chunk, now = result.result()
                seconds, ready = now - max(started, ready), now
                counts = np.where(self._stopped, 0, chunk.counts)
                self._room, self._ended = self._room - counts, chunk.done
                grades = _first_steps(chunk.grades, counts.max())
                if grades is not None:
                    observed = grades.bits.swapaxes(0, 1), counts, setting
                tokens = [row[:n].tolist() for row, n in zip(chunk.tokens, counts, strict=True)]
                yield NewTokens(tokens, grades, seconds)
        finally:
            reader.shutdown(wait=False)

    def stop(self, rows: Bool[np.ndarray, "b"]) -> None:
        """Ends rows before their limit, because of what their text says: they generate nothing further."""
        self._stopped |= rows
        self._done |= jnp.asarray(rows)

    def _goes_on(self, under_way: int) -> bool:
        """Whether any row may have tokens to generate beyond so many chunks."""
        open_rows = ~(self._ended | self._stopped)
        return bool(np.any(open_rows & (self._room > under_way * self._policy.chunk_steps)))

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._place)

    def _read(
        self, block: Int[np.ndarray, "b t"], lengths: Int[jax.Array, "b"]
    ) -> tuple[Float[jax.Array, "b v"], engine.Preview | None]:
        """Reads a block of the prompts."""
        if self._dial is None:
            logits, self._cache = engine.prefill(self._model, block, lengths, self._cache)
            return logits, None
        logits, self._cache, preview = engine.prefill_with_preview(
            self._model, block, lengths, self._cache, self._thresholds
        )
        return logits, preview

    def _follow(
        self,
        bits: Float[np.ndarray, "b steps linears"],
        counts: Int[np.ndarray, "b"],
        setting: Float[np.ndarray, "b"] | None = None,
    ) -> None:
        self._dial.observe(bits, counts, setting)
        self._thresholds = self._dial.thresholds

    def _decode(self, limits: Int[jax.Array, "b"]) -> engine.Chunk:
        chunk, self._cache = engine.decode_chunk(
            self._model,
            self._last,
            self._done,
            self._cache,
            self._thresholds,
            self._sampling,
            self._stop_tokens,
            limits,
            steps=self._policy.chunk_steps,
            policy=self._policy,
        )
        return chunk

    def _blocks(self) -> Iterator[tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]]:
        """The prompts cut into blocks: padded tokens, and how many of them each row has."""
        longest, start = int(self._lengths.max()), 0
        while start < longest:
            width = SHORTEST_BLOCK
            while width < min(longest - start, LONGEST_BLOCK):
                width *= 2
            lengths = np.clip(self._lengths - start, 0, width).astype(np.int32)
            block = np.zeros((len(self._prompts), width), np.int32)
            for row, prompt in enumerate(self._prompts):
                block[row, : lengths[row]] = prompt[start : start + width]
            yield block, lengths
            start += width


def _on_host(chunk: engine.Chunk) -> tuple[engine.Chunk, float]:
    """The chunk as numpy arrays, all in one transfer, and when it was there."""
    return jax.device_get(chunk), time.perf_counter()


def _first_steps(grades: engine.Grades | None, count: int | np.integer) -> engine.Grades | None:
    # cut on the host: on the device every other count would compile another program
    return jax.tree.map(lambda steps: steps[:count], grades)
