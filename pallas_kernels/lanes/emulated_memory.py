"""The emulator's shared memory, which knows who accessed each word last and refuses races."""

import numpy as np

from pallas_kernels.lanes.instructions import LANES


class EmulationError(Exception):
    """The lane program did what a GPU forbids or leaves undefined."""


class SharedMemory:
    """The shared memory of all CTAs, in words, with the last accesses of each word (no barrier between
    two threads' accesses to one word, one of them a write: a race)."""

    def __init__(self, blocks: int, threads: int, size: int, rng: np.random.Generator):
        self.size, self.threads = size, threads
        words = blocks * size // 4
        self.data = rng.integers(0, 2**32, words, dtype=np.uint32)
        self.writer = np.full(words, -1)
        self.reader = np.full(words, -1)
        self.write_time = np.zeros((2, words), np.int64)
        self.read_time = np.zeros((2, words), np.int64)
        self.block_time = np.zeros(blocks, np.int64)
        self.warp_time = np.zeros(blocks * threads // LANES, np.int64)

    def words(self, thread, address, count, what):
        """Word indices ``[len(thread), count]`` of each thread's access."""
        if (address % (4 * count)).any():
            raise EmulationError(f"{what} of {4 * count} bytes is not aligned")
        if (address < 0).any() or (address + 4 * count > self.size).any():
            raise EmulationError(f"{what} out of the {self.size} bytes of shared memory")
        base = thread // self.threads * self.size + address
        return base[:, None] // 4 + np.arange(count)

    def _check(self, thread, word, other, time, what):
        """``other``, ``time``: who accessed the words last, and when."""
        same_warp = other // LANES == thread // LANES
        now = np.where(same_warp, self.warp_time[thread // LANES], self.block_time[thread // self.threads])
        last = np.where(same_warp, time[1], time[0])
        if ((other >= 0) & (other != thread) & (last == now)).any():
            raise EmulationError(f"race in shared memory: {what} another thread's access, no barrier between")

    def now(self, thread):
        """Barriers passed so far, of each thread's CTA and of its warp."""
        return np.stack([self.block_time[thread // self.threads], self.warp_time[thread // LANES]])

    def read(self, thread, address, count):
        word = self.words(thread, address, count, "load")
        thread = np.broadcast_to(thread[:, None], word.shape)
        if (self.writer[word] < 0).any():
            raise EmulationError("load of shared memory that nothing has written")
        self._check(thread, word, self.writer[word], self.write_time[:, word], "load after")
        self.reader[word] = thread
        self.read_time[:, word] = self.now(thread)
        return self.data[word]

    def touch(self, thread, word):
        """Records a write of ``word`` by ``thread`` (both ``[n, count]``), checking for races."""
        self._check(thread, word, self.writer[word], self.write_time[:, word], "store after")
        self._check(thread, word, self.reader[word], self.read_time[:, word], "store after")
        if np.unique(word).size != word.size:
            raise EmulationError("race in shared memory: two threads store to one word")
        self.writer[word] = thread
        self.write_time[:, word] = self.now(thread)

    def write(self, thread, address, values):
        word = self.words(thread, address, values.shape[1], "store")
        self.touch(np.broadcast_to(thread[:, None], word.shape), word)
        self.data[word] = values

    def expect(self, thread, word):
        """An asynchronous copy into ``word`` ``[n, count]`` has started: nothing may read it yet."""
        self.touch(np.broadcast_to(thread[:, None], word.shape), word)
        self.writer[word] = -1

    def arrive(self, thread, word, values):
        """The copy is finished and waited for, by ``thread``."""
        self.data[word] = values
        self.writer[word] = thread[:, None]
        self.write_time[:, word] = self.now(thread)[:, :, None]
