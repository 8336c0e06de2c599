"""The decode loop on the host: decides which prompt is read and which answers are decoded next.

Continuous batching: requests enter and leave slots between decode chunks. A round reads one prefill chunk of
one prompt and decodes one chunk of all answers, so an answer never waits for more tokens. (If the prompts of
many requests were read first, their answers would end together. The next prompts would then come together as
well, and the first of them would wait for all others.) In an engine for many requests, prefill chunks end at
positions that depend on the prompt alone, so a hit and a miss of the shared prefixes read the same ones. An
answer therefore does not depend on load or on what is in the cache. A single text runs in the same loop, with
one slot.
"""

import dataclasses
import heapq
import itertools
import time
from typing import Any

import jax
import numpy as np

from grinqh_jax.decoding.batching.in_flight import Arrival, InFlight, Work
from grinqh_jax.decoding.batching.job import FinishReason, Job, Storage
from grinqh_jax.decoding.logprobs import TokenLogprobs
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.speculation.draft_length import DraftLength


class Scheduler:
    """Runs jobs on one model. Not thread-safe: one thread calls all methods.

    Attributes:
      waiting, reading, decoding: Jobs by their stage.
      prompt_tokens: Number of prompt tokens of all jobs that left the queue so far.
      reused_tokens: Number of these that were in the cache already.
    """

    def __init__(
        self, device: Device, storage: Storage, policy: DecodePolicy, *, prompts_first: bool = False
    ):
        """Makes a scheduler without jobs.

        Args:
          device: Model and state on the device.
          storage: Storage of keys and values, of the same shape.
          policy: How chunks are scheduled.
          prompts_first: Whether a round reads all prompts that have slots, and not a prefill chunk of one.
            Texts that nobody waits for take fewer decode chunks then.
        """
        self.waiting: list[tuple[int, int, Job]] = []
        self.reading: list[tuple[int, int, Job]] = []
        self.decoding: dict[int, Job] = {}
        self.prompt_tokens = self.reused_tokens = 0
        self._device = device
        self._storage = storage
        self._policy = policy
        self._prompts_first = prompts_first
        self._free_slots = list(range(device.shape.slots - 1, -1, -1))
        self._in_flight = InFlight(in_thread=policy.chunks_ahead > 0)
        self._numbers = itertools.count()
        self._draft_length = DraftLength(
            device.step_shapes,
            always=device.speculation is not None and device.speculation.always,
            measures=jax.process_count() == 1,
            reads_all_rows=device.on_mesh,
        )
        self._launched = False

    def close(self) -> None:
        """Ends the thread that waits for results, after the one that it waits for."""
        self._in_flight.close()

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs, and nothing is in flight."""
        return not (self.waiting or self.reading or self.decoding or self._in_flight)

    def add(self, job: Job) -> None:
        """Queues a job that can fit."""
        heapq.heappush(self.waiting, (job.priority, next(self._numbers), job))

    def cancel(self, job: Job) -> None:
        """Ends a job. The decode chunk in flight is the last to compute it, and its tokens are dropped."""
        if not job.ended:
            self._end(job, "cancelled")

    def turn(self, job: Job, bits: float) -> None:
        """Changes the wanted mean bits of a job, from the next decode chunk on.

        A prompt that is being read is previewed to its end at the bits of its beginning, because the dial
        compares the preview of a prefill chunk with the bits that the answer starts with.
        """
        slot = job.slot
        if slot is not None and self.decoding.get(slot) is not job:
            job.turned = bits
            return
        row: Any = np.array([bits], np.float32)
        job.settings = dataclasses.replace(job.settings, bits=row)
        if slot is not None:
            self._device.turn(slot, bits)

    def step(self) -> None:
        """Runs one round: dispatches work, and delivers the results that are due."""
        self.dispatch()
        while self.deliver():
            pass

    def dispatch(self) -> None:
        """Begins a round: admits jobs, reads a prefill chunk and launches a decode chunk."""
        self._admit()
        while self.reading:
            job = self.reading[0][-1]
            self._read(job)
            if not job.buckets:
                heapq.heappop(self.reading)
                self._start(job)
            if not self._prompts_first:
                break
        # Where the host is the device, a chunk would delay the first token of a text that is alone.
        alone = self._policy.chunks_ahead == 0 and len(self.decoding) == 1
        # The mask of a token depends on all tokens before.
        waits = (alone or self._masked) and bool(self._in_flight)
        self._launched = not waits and self._launch()

    def deliver(self) -> bool:
        """Delivers the next result of the round, if one is due; returns whether another one is."""
        if self._is_due():
            self._deliver(self._in_flight.next())
        # A delivered job may have made room, so a round without a chunk ends here.
        return self._launched and self._is_due()

    @property
    def _masked(self) -> bool:
        """Whether an answer has a grammar, so that decode chunks have one step."""
        return any(job.grammar is not None for job in self.decoding.values())

    def _is_due(self) -> bool:
        ahead = self._policy.chunks_ahead if self._launched and not self._masked else 0
        return self._in_flight.chunks > ahead or self._in_flight.next_is_first

    def _admit(self) -> None:
        """Gives slots and pages to waiting jobs, in order. The first one that does not fit waits for both."""
        while self.waiting and self._free_slots:
            priority, number, job = self.waiting[0]
            job.slot = self._free_slots[-1]
            reused = self._storage.reserve(job)
            if reused is None:
                job.slot = None
                return
            heapq.heappop(self.waiting)
            self._free_slots.pop()
            job.prefix = self._device.prefix(job.pages, reused, job.fixed)
            job.buckets.extend(self._storage.cut(job, reused))
            self.prompt_tokens += len(job.prompt)
            self.reused_tokens += reused
            job.admitted = time.perf_counter()
            job.answer.begin(reused)
            heapq.heappush(self.reading, (priority, number, job))

    def _read(self, job: Job) -> None:
        """Dispatches the next prefill chunk of a prompt."""
        bucket = job.buckets.popleft()
        assert job.prefix is not None, "an admitted job has a prefix"
        if job.prompt_logprobs:
            rest = job.prompt[bucket.end - int(bucket.lengths[0]) + 1 : bucket.end + 1]
            following = np.zeros_like(bucket.tokens)
            following[0, : len(rest)] = rest
            logprobs = self._device.prompt_logprobs(job.prefix, bucket, following)
            job.prompt_results.append((logprobs, len(rest)))
        job.prefix = self._device.prefill(job.prefix, bucket, job.settings)
        self._storage.keep(job, bucket.end)

    def _start(self, job: Job) -> None:
        """Moves a job whose prompt is read to the answers."""
        assert job.slot is not None, "an admitted job has a slot"
        assert job.prefix is not None, "an admitted job has a prefix"
        allowed = None if job.grammar is None else self._allowed(job)
        if job.ended:
            return
        first = self._device.insert(job.slot, job.prefix, job.prompt, job.settings, job.logprobs, allowed)
        job.prefix, job.dispatched = None, 1
        if self._device.speculation is not None:
            job.answer.receive_speculation(job.figures)
        self.decoding[job.slot] = job
        if job.turned is not None:
            self.turn(job, job.turned)
        self._in_flight.add(Work({0: job}, job.admitted, is_first=True), first)

    def _launch(self) -> bool:
        """Dispatches a decode chunk, if an answer may go on; returns whether it has."""
        masks = self._masks()
        going = {slot: job for slot, job in self.decoding.items() if job.dispatched < job.limit}
        if not going:
            return False
        asked, device = time.perf_counter(), self._device
        logprobs = any(job.logprobs for job in going.values())
        greedy = not logprobs and all(job.greedy for job in going.values())
        shape = device.step_shapes[0]
        if masks is None:
            texts = [job.acceptance for job in going.values()]
            shape = self._draft_length.choose(texts, device.shape.slots if logprobs else 0)
        idle = (slot for slot in range(device.shape.slots) if slot not in going)
        rows = sorted([*going, *itertools.islice(idle, shape.texts - len(going))])
        counts = None
        if device.speculation is None:
            level = device.level(float(job.settings.bits[0]) for job in going.values())
            chunk = device.generate(rows, greedy, logprobs, masks, level)
        else:
            drafts = [shape.drafts] * len(rows)
            chunk, counts = device.speculate(rows, drafts, shape.drafts, greedy, logprobs, masks)
        for job in going.values():
            job.dispatched += 1 if masks is not None else device.steps(shape)
        jobs = {row: going[slot] for row, slot in enumerate(rows) if slot in going}
        self._in_flight.add(Work(jobs, asked, shape=shape), chunk, counts)
        return True

    def _masks(self) -> Any:
        """Returns the tokens that each slot may choose next; None if no answer has a grammar."""
        allowed = {}
        for slot, job in list(self.decoding.items()):
            if job.grammar is not None and (mask := self._allowed(job)) is not None:
                allowed[slot] = mask
        return self._device.masks(allowed) if self._masked else None

    def _allowed(self, job: Job) -> Any:
        """Returns the tokens that may come next in an answer with a grammar; None if it fails and ends."""
        assert job.grammar is not None, "the answer has a grammar"
        try:
            return job.grammar.allowed()
        except Exception as error:  # Other answers go on.
            self._end(job, error)
            return None

    def _deliver(self, arrival: Arrival) -> None:
        """Gives results to their jobs."""
        work, chunk = arrival.work, arrival.chunk
        if arrival.counts is not None:
            self._learn(arrival)
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
                stopped = job.answer.receive(tokens, stats, logprobs, arrival.seconds)
                if job.grammar is not None and not chunk.done[row]:
                    stopped |= any(job.grammar.push(token) for token in tokens)
            except Exception as error:  # Other answers go on.
                self._end(job, error)
                continue
            if stopped or chunk.done[row]:
                self._end(job, "stop" if stopped else "length")

    def _learn(self, arrival: Arrival) -> None:
        """Updates what is known of the texts of a chunk with speculation, and of the time of a step."""
        shape, counts, seconds = arrival.work.shape, arrival.counts, arrival.seconds
        assert shape is not None, "a chunk has a shape"
        for row, job in arrival.work.jobs.items():
            values = counts.steps, counts.drafting_steps, counts.drafted, counts.accepted
            steps, drafting, drafted, accepted = (int(of_rows[row]) for of_rows in values)
            bits, drafting_seconds = float(counts.rejected_bits[row]), seconds if shape.drafts else 0.0
            job.figures.add(steps, drafting, drafted, accepted, bits, drafting_seconds)
            if shape.drafts:
                job.acceptance.update(steps, drafting, drafted, accepted)
        steps = int(np.max(counts.steps))
        if steps > 1:  # A chunk of one step is mostly launch.
            every = steps if self._policy.early_exit else self._device.steps(shape)
            self._draft_length.measure(shape, every, int(counts.steps_with_any[0]), seconds)

    def _end(self, job: Job, reason: FinishReason | Exception) -> None:
        """Frees a job's slot and pages, wherever the job is, and reports its end or its failure."""
        job.ended = True
        for queue in (self.waiting, self.reading):
            queue[:] = [entry for entry in queue if entry[-1] is not job]
            heapq.heapify(queue)
        if job.slot is not None:
            if self.decoding.pop(job.slot, None) is not None:
                self._device.free(job.slot)
            # Work in flight may still write these pages. Whoever gets them writes later.
            self._storage.release(job)
            self._free_slots.append(job.slot)
            job.pages, job.prefix, job.fixed = [], None, None
        try:
            if isinstance(reason, Exception):
                raise reason
            job.answer.end(reason)
        except Exception as error:
            job.answer.fail(error)


def _concatenated(results: list[tuple[TokenLogprobs, int]]) -> TokenLogprobs:
    """Joins the log-probabilities of prefill chunks ``[1, t]``, without those of padding."""
    parts = [jax.tree.map(lambda rows: rows[0, :length], logprobs) for logprobs, length in results]  # noqa: B023
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
