"""The host's part of the engine: decides which prompt is read and which answers are decoded next.

Continuous batching: requests enter and leave slots between decode chunks. A round reads at most one piece of
one prompt and decodes one chunk of all answers, so an answer never waits for more than one piece. Pieces end
at positions that depend on the prompt alone, so a hit and a miss of the shared prefixes read the same pieces.
An answer therefore does not depend on load or on what is in the cache.
"""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.logprobs import TokenLogprobs
from grinqh_jax.decoding.model_files import prompt_too_long
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.prefill_buckets import cut_pieces, first_previewed
from grinqh_jax.errors import UsageError
from grinqh_jax.serving.device import Device
from grinqh_jax.serving.job import EngineError, EngineStats, FinishReason, Job, Shape
from grinqh_jax.serving.pages import PageAllocator


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """Results that the device may still be computing.

    Attributes:
      jobs: Jobs by row of the chunk, as they were when the work was dispatched.
      chunk: A decode chunk; or the first token of the only job.
      is_first: Whether the chunk is a first token.
    """

    jobs: dict[int, Job]
    chunk: engine.Chunk
    is_first: bool = False


class Scheduler:
    """Runs jobs on one model. Not thread-safe: one thread calls all methods.

    Attributes:
      allocator: Pages of the cache.
      shape: Sizes of the engine.
    """

    def __init__(self, device: Device, shape: Shape, policy: DecodePolicy):
        """Makes a scheduler without jobs.

        Args:
          device: Model and state on the device, of the same shape.
          shape: Sizes of the engine.
          policy: How chunks are scheduled.
        """
        self.allocator = PageAllocator(shape.num_pages, shape.page_size)
        self.shape = shape
        self._device = device
        self._policy = policy
        self._waiting: list[tuple[int, int, Job]] = []
        self._reading: list[tuple[int, int, Job]] = []
        self._decoding: dict[int, Job] = {}
        self._free_slots = list(range(shape.slots - 1, -1, -1))
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._numbers = itertools.count()
        self._prompt_tokens = self._reused_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs, and nothing is in flight."""
        return not (self._waiting or self._reading or self._decoding or self._in_flight)

    def stats(self) -> EngineStats:
        """Returns how much of the engine is in use. May be called from any thread."""
        return EngineStats(
            waiting=len(self._waiting),
            reading=len(self._reading),
            decoding=len(self._decoding),
            slots=self.shape.slots,
            pages=self.allocator.num_pages,
            pages_in_use=self.allocator.in_use,
            pages_kept=self.allocator.kept,
            pages_evicted=self.allocator.evicted,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
        )

    def check(self, prompt: int, answer: int) -> None:
        """Raises UsageError if a prompt and an answer of these lengths can never fit."""
        shape = self.shape
        if prompt < 1:
            raise UsageError("a prompt has no tokens; give at least one")
        if prompt >= shape.max_context:
            raise prompt_too_long(prompt, shape.max_context)
        pages = self.allocator.pages_for(prompt + answer)
        if pages > shape.num_pages:
            raise UsageError(
                f"{prompt} prompt tokens and an answer of {answer} take {pages} cache pages of "
                f"{shape.page_size} tokens, and the cache has {shape.num_pages}; shorten the request or "
                "raise the cache memory"
            )

    def add(self, job: Job) -> None:
        """Queues a job that has passed ``check``."""
        heapq.heappush(self._waiting, (job.priority, next(self._numbers), job))

    def cancel(self, job: Job) -> None:
        """Ends a job. The decode chunk in flight is the last to compute it, and its tokens are dropped."""
        if not job.ended:
            self._end(job, "cancelled")

    def turn(self, job: Job, bits: float) -> None:
        """Changes the wanted mean bits of a job, from the next decode chunk on."""
        row: Any = np.array([bits], np.float32)
        job.settings = dataclasses.replace(job.settings, bits=row)
        if job.slot in self._decoding:
            self._device.turn(job.slot, bits)

    def step(self) -> None:
        """Runs one round: admits jobs, reads a piece, launches a decode chunk and delivers results."""
        self._admit()
        if self._reading:
            job = self._reading[0][-1]
            self._read(job)
            if not job.pieces:
                heapq.heappop(self._reading)
                self._start(job)
        launched = self._launch()
        ahead = self._policy.chunks_ahead if launched else 0
        while self._in_flight and (self._chunks_in_flight() > ahead or self._in_flight[0].is_first):
            self._deliver(self._in_flight.popleft())
            if not launched:
                break  # A delivered job may have made room.

    def _admit(self) -> None:
        """Gives slots and pages to waiting jobs, in order. The first one that does not fit waits for both."""
        while self._waiting and self._free_slots:
            priority, number, job = self._waiting[0]
            reused = self._reserve(job)
            if reused is None:
                return
            heapq.heappop(self._waiting)
            job.slot = self._free_slots.pop()
            job.prefix = self._device.prefix(job.pages, reused)
            job.pieces.extend(cut_pieces(job.prompt, reused, self.shape.piece, self._device.graded))
            self._prompt_tokens += len(job.prompt)
            self._reused_tokens += reused
            job.answer.begin(reused)
            heapq.heappush(self._reading, (priority, number, job))

    def _reserve(self, job: Job) -> int | None:
        """Takes all pages of a job; returns the number of shared tokens, or None if pages are missing."""
        unit = self.shape.piece // self.shape.page_size
        shareable = 0 if job.prompt_logprobs else self._shareable(job.prompt)
        shared = self.allocator.share(job.prompt[:shareable], unit)
        total = self.allocator.pages_for(len(job.prompt) + job.limit)
        own = self.allocator.allocate(total - len(shared))
        if own is None:
            self.allocator.release(shared)
            return None
        job.pages = shared + own
        return len(shared) * self.shape.page_size

    def _read(self, job: Job) -> None:
        """Dispatches the next piece of a prompt. Whole pieces are then shared."""
        piece = job.pieces.popleft()
        assert job.prefix is not None, "an admitted job has a prefix"
        if job.prompt_logprobs:
            start = piece.end - int(piece.lengths[0])
            rest = job.prompt[start + 1 : piece.end + 1]
            following = np.zeros_like(piece.tokens)
            following[0, : len(rest)] = rest
            logprobs = self._device.prompt_logprobs(job.prefix, piece, following)
            job.prompt_results.append((logprobs, len(rest)))
        job.prefix = self._device.prefill(job.prefix, piece, job.settings)
        self.allocator.register(job.prompt[: min(piece.end, self._shareable(job.prompt))], job.pages)

    def _shareable(self, prompt: Sequence[int]) -> int:
        """Returns the number of leading tokens that may come from shared pages: whole pieces.

        The tokens of the preview are always read, and so is the last token, for the logits.
        """
        read = first_previewed(len(prompt)) if self._device.graded else len(prompt) - 1
        return read // self.shape.piece * self.shape.piece

    def _start(self, job: Job) -> None:
        """Moves a job whose prompt is read to the answers."""
        assert job.slot is not None, "an admitted job has a slot"
        assert job.prefix is not None, "an admitted job has a prefix"
        first = self._device.insert(job.slot, job.prefix, job.prompt, job.settings)
        job.prefix, job.dispatched = None, 1
        self._decoding[job.slot] = job
        self._track(_InFlight({0: job}, first, is_first=True))

    def _launch(self) -> bool:
        """Dispatches a decode chunk, if an answer may go on; returns whether it has."""
        if all(job.dispatched >= job.limit for job in self._decoding.values()):
            return False
        logprobs = any(job.logprobs for job in self._decoding.values())
        greedy = not logprobs and all(job.greedy for job in self._decoding.values())
        chunk = self._device.generate(greedy, logprobs)
        for job in self._decoding.values():
            job.dispatched += self._policy.chunk_steps
        self._track(_InFlight(dict(self._decoding), chunk))
        return True

    def _track(self, work: _InFlight) -> None:
        """Starts the transfer of results to the host, and remembers to deliver them."""
        for array in jax.tree.leaves(work.chunk):
            array.copy_to_host_async()
        self._in_flight.append(work)

    def _chunks_in_flight(self) -> int:
        return sum(not work.is_first for work in self._in_flight)

    def _deliver(self, work: _InFlight) -> None:
        """Waits for results and gives them to their jobs."""
        chunk: Any = jax.device_get(work.chunk)
        for row, job in work.jobs.items():
            if job.ended:
                continue
            tokens = chunk.tokens[row, : chunk.counts[row]].tolist()
            # Copies, because the arrays have the rows of all jobs.
            stats, logprobs = jax.tree.map(
                lambda steps: steps[: len(tokens), row].copy(),  # noqa: B023
                (chunk.grading_stats, chunk.logprobs if job.logprobs else None),
            )
            try:
                if work.is_first and job.prompt_results:
                    job.answer.receive_prompt(_concatenated(jax.device_get(job.prompt_results)))
                    job.prompt_results.clear()
                stopped = job.answer.receive(tokens, stats, logprobs)
            except Exception as error:  # Other answers go on.
                self._end(job, error)
                continue
            if stopped or chunk.done[row]:
                self._end(job, "stop" if stopped else "length")

    def _end(self, job: Job, reason: FinishReason | Exception) -> None:
        """Frees a job's slot and pages, wherever the job is, and reports its end or its failure."""
        job.ended = True
        for queue in (self._waiting, self._reading):
            queue[:] = [entry for entry in queue if entry[-1] is not job]
            heapq.heapify(queue)
        if job.slot is not None:
            if self._decoding.pop(job.slot, None) is not None:
                self._device.free(job.slot)
            # Work in flight may still write these pages. Whoever gets them writes later.
            self.allocator.release(job.pages)
            self._free_slots.append(job.slot)
            job.pages, job.prefix = [], None
        try:
            if isinstance(reason, Exception):
                raise reason
            job.answer.end(reason)
        except Exception as error:
            job.answer.fail(EngineError(f"the answer failed: {error!r}"), error)


def _concatenated(results: list[tuple[TokenLogprobs, int]]) -> TokenLogprobs:
    """Joins the log-probabilities of pieces ``[1, t]``, without those of padding."""
    pieces = [jax.tree.map(lambda rows: rows[0, :length], logprobs) for logprobs, length in results]  # noqa: B023
    return jax.tree.map(lambda *rows: np.concatenate(rows), *pieces)
