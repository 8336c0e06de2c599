"""Results that the device may still be computing, and the time that they take."""

import collections
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.engine.chunk import Chunk
from grinqh_jax.decoding.slots.step_shapes import StepShape
from grinqh_jax.decoding.speculation.counts import PackedCounts


@dataclasses.dataclass(frozen=True)
class Work:
    """A decode chunk, or the first token of a job.

    Attributes:
      jobs: Jobs by row of the chunk, as they were when the work was dispatched.
      asked: Time at which the work was dispatched; of a first token, at which the job got its slot.
      is_first: Whether the result is the first token of the only job.
      shape: Sizes of the steps of a chunk.
    """

    jobs: Mapping[int, Job]
    asked: float
    is_first: bool = False
    shape: StepShape | None = None


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A result, as numpy arrays.

    Attributes:
      work: What was dispatched.
      chunk: New tokens of each row.
      counts: ``Counts`` of what speculation did for each row; None without.
      seconds: Time that the device took (see ``job.Receiver.receive``).
    """

    work: Work
    chunk: Any
    counts: Any
    seconds: float


class InFlight:
    """Work in the order in which it was dispatched. ``len`` is the number of results that have not arrived.

    Attributes:
      chunks: Number of decode chunks that have not arrived.
    """

    def __init__(self, *, in_thread: bool):
        """Starts without work.

        Args:
          in_thread: Whether a thread waits for results and takes the time, because the caller is busy when
            they arrive.
        """
        self.chunks = 0
        self._work: collections.deque[tuple[Work, Callable[[], tuple[Any, Any, float]]]] = collections.deque()
        self._reader = concurrent.futures.ThreadPoolExecutor(1) if in_thread else None
        self._arrived = 0.0

    def __len__(self) -> int:
        return len(self._work)

    @property
    def next_is_first(self) -> bool:
        """Whether the next result is a first token."""
        return bool(self._work) and self._work[0][0].is_first

    def add(self, work: Work, chunk: Chunk, counts: PackedCounts | None = None) -> None:
        """Remembers dispatched work and its results on the device."""
        fetch = functools.partial(_to_host, chunk, counts)
        self._work.append((work, fetch if self._reader is None else self._reader.submit(fetch).result))
        self.chunks += not work.is_first

    def next(self) -> Arrival:
        """Waits for the next result."""
        work, result = self._work.popleft()
        self.chunks -= not work.is_first
        chunk, counts, arrived = result()
        seconds = arrived - (work.asked if work.is_first else max(work.asked, self._arrived))
        self._arrived = arrived
        return Arrival(work, chunk, None if counts is None else counts.unpacked, seconds)

    def close(self) -> None:
        """Ends the thread, after the result that it waits for."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)


def _to_host(chunk: Chunk, counts: PackedCounts | None) -> tuple[Any, Any, float]:
    """Fetches results as numpy arrays, all in one transfer; returns them and the time of their arrival."""
    return *jax.device_get((chunk, counts)), time.perf_counter()
