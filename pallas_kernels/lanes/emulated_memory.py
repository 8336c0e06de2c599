"""The emulator's memory: global memory, and shared memory, which records accesses and raises on races."""

import numpy as np

from pallas_kernels.lanes.instructions import LANES

ADDRESS_BITS = 40
"""A global address is ``(array number << 40) + byte``."""

NOBODY = -1
"""Writer of a word that nothing has written."""

COPY = -2
"""Writer of a word that an asynchronous copy is still writing."""

ARRIVED = -3
"""Writer of a word that a copied box has written."""


class EmulationError(Exception):
    """Raised if a lane program does something that a GPU forbids or leaves undefined."""


class GlobalMemory:
    """The arrays in global memory, in bytes and in their shapes, numbered from 1."""

    def __init__(self):
        self.arrays: list[np.ndarray] = []
        self.shaped: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> int:
        """Adds a contiguous array, which stores change in place; returns its number."""
        self.shaped.append(array)
        self.arrays.append(array.reshape(-1).view(np.uint8))
        return len(self.arrays)

    def address(self, number: int) -> int:
        """Returns the address of an array."""
        return number << ADDRESS_BITS

    def box(self, number: int, sizes: tuple[int, ...], corner: list[int]) -> np.ndarray:
        """Returns a box of an array, with zeros outside of the array."""
        array = self.shaped[number - 1]
        box = np.zeros(sizes, array.dtype)
        inside = [
            (max(c, 0), min(c + size, end)) for c, size, end in zip(corner, sizes, array.shape, strict=True)
        ]
        if all(first < end for first, end in inside):
            target = tuple(slice(first - c, end - c) for (first, end), c in zip(inside, corner, strict=True))
            box[target] = array[tuple(slice(*ends) for ends in inside)]
        return box

    def locate(self, address, count, access):
        """Returns the array and the byte indices ``[n, count]`` of ``n`` addresses, all of one array."""
        number = address >> ADDRESS_BITS
        if not number.size or (number != number[0]).any() or not 1 <= number[0] <= len(self.arrays):
            raise EmulationError(f"{access} outside of every array")
        array = self.arrays[number[0] - 1]
        offset = address & ((1 << ADDRESS_BITS) - 1)
        if (offset % count).any():
            raise EmulationError(f"{access} of {count} bytes is not aligned")
        if (offset + count > array.size).any():
            raise EmulationError(f"{access} past the end of an array of {array.size} bytes")
        return array, offset[:, None] + np.arange(count)


class SharedMemory:
    """The shared memory of all CTAs, in 32-bit words.

    A race is two accesses to one word by different threads, at least one of them a write, without a barrier
    in between. To detect races, the memory keeps for each word its last writer and reader, and the number of
    CTA barriers and of warp barriers that they had passed. Threads are numbered through all CTAs.

    Attributes:
      size: Bytes of shared memory of one CTA.
      threads: Number of threads of one CTA.
      data: uint32 ``[words]``, the contents.
      writer, reader: int ``[words]``, last thread that wrote or read the word, or a constant above.
      last_store: int ``[words]``, position of the word among those of the last store to it.
      epoch: int ``[words]``, number of ``publishes`` when the word was last written.
      publishes: For each ``publish``, the threads that took part, ``[threads]``, and the barriers that all
        threads had passed, ``[3, threads]``.
      arrival: int ``[2, words]``, of words that a box has written: number of the arrival barrier, and the
        time at which the box arrived.
      waited: For each number of an arrival barrier, when each warp last waited for it, int ``[warps]``.
      set_time: int64 ``[words]``, barriers of the CTA passed when a thread last set bits; -1 for none.
      write_time, read_time: int64 ``[3, words]``, barriers of the cluster, the CTA and the warp that the
        thread had passed before that access.
      cluster_time, block_time, warp_time: int64 ``[clusters]``, ``[CTAs]`` and ``[warps]``, barriers passed
        so far. A barrier of a cluster is also one of its CTAs, and a barrier of a CTA one of its warps.
    """

    def __init__(self, blocks: int, threads: int, size: int, rng: np.random.Generator, cluster: int = 1):
        self.size, self.threads, self.cluster = size, threads, cluster
        words = blocks * size // 4
        self.data = rng.integers(0, 2**32, words, dtype=np.uint32)
        self.writer = np.full(words, NOBODY)
        self.reader = np.full(words, NOBODY)
        self.last_store = np.zeros(words, np.int64)
        self.epoch = np.zeros(words, np.int64)
        self.publishes: list[tuple[np.ndarray, np.ndarray]] = []
        self.arrival = np.zeros((2, words), np.int64)
        self.waited: list[np.ndarray] = []
        self.set_time = np.full(words, -1)
        self.write_time = np.zeros((3, words), np.int64)
        self.read_time = np.zeros((3, words), np.int64)
        self.cluster_time = np.zeros(blocks // cluster, np.int64)
        self.block_time = np.zeros(blocks, np.int64)
        self.warp_time = np.zeros(blocks * threads // LANES, np.int64)

    def words(self, thread, address, count, access, block=None):
        """Returns the word indices ``[len(thread), count]`` of each thread's access.

        ``block`` is the CTA that is accessed, by default the thread's."""
        if (address % (4 * count)).any():
            raise EmulationError(f"{access} of {4 * count} bytes is not aligned")
        if (address < 0).any() or (address + 4 * count > self.size).any():
            raise EmulationError(f"{access} outside of the {self.size} bytes of shared memory")
        base = (thread // self.threads if block is None else block) * self.size + address
        return base[:, None] // 4 + np.arange(count)

    def _check(self, thread, now, other, times, word, access):
        """Raises if another thread, ``other``, accessed ``word`` and no barrier came since.

        ``now`` is the time of ``thread``, and ``times`` is ``read_time`` or ``write_time``, or is numbered
        like them. Shapes may differ where they broadcast.
        """
        others = (other >= 0) & (other != thread)
        if not others.any():
            return
        cluster, block, warp = now
        same_warp = other // LANES == thread // LANES
        raced = np.where(same_warp, times[2, word] == warp, times[1, word] == block)
        if self.cluster > 1:  # Only then can a thread of another CTA have accessed a word.
            same_block = other // self.threads == thread // self.threads
            raced = np.where(same_block, raced, times[0, word] == cluster)
        if (others & raced).any():
            raise EmulationError(f"race in shared memory: {access} another thread's access without a barrier")

    def _check_writers(self, thread, now, word, access):
        """Raises if other threads wrote the words and no barrier came since."""
        self._check(thread, now, self.writer[word], self.write_time, word, access)

    def _check_set(self, thread, word, access):
        """Raises if threads of the CTA set bits of the words and no barrier of the CTA came since."""
        if (self.set_time[word] == self.block_time[thread // self.threads]).any():
            raise EmulationError(f"race in shared memory: {access} another thread set bits without a barrier")

    def now(self, thread):
        """Returns ``[3, *thread.shape]``: the barriers of its cluster, CTA and warp that each has passed."""
        block = thread // self.threads
        time = np.empty((3, *thread.shape), np.int64)
        time[0] = self.cluster_time[block // self.cluster]
        time[1] = self.block_time[block]
        time[2] = self.warp_time[thread // LANES]
        return time

    def read(self, thread, address, count, unwritten=False):
        """Loads ``count`` words for each thread; with ``unwritten`` also words that nothing has written."""
        word = self.words(thread, address, count, "load")
        thread = thread[:, None]
        writer, now = self.writer[word], self.now(thread)
        if ((writer == NOBODY) & (not unwritten) | (writer == COPY)).any():
            raise EmulationError(
                "load of shared memory that nothing has written, or that a copy is still writing"
            )
        boxes = writer == ARRIVED
        if boxes.any():
            number, time = self.arrival[:, word[boxes]]
            warp = np.broadcast_to(thread, word.shape)[boxes] // LANES
            if (np.stack(self.waited)[number, warp] < time).any():
                raise EmulationError("load of a copied box whose arrival this warp has not waited for")
        self._check(thread, now, writer, self.write_time, word, "load after")
        self._check_set(thread, word, "load after")
        self.reader[word] = thread
        self.read_time[:, word] = now
        return self.data[word]

    def touch(self, thread, word):
        """Records that ``thread`` (``[n, 1]``) writes ``word`` (``[n, count]``) and checks for races."""
        now = self.now(thread)
        self._check_writers(thread, now, word, "store after")
        self._check_set(thread, word, "store after")
        if (self.writer[word] == COPY).any():
            raise EmulationError("store to shared memory that a copy is still writing")
        self._check(thread, now, self.reader[word], self.read_time, word, "store after")
        order = np.arange(word.size).reshape(word.shape)
        self.last_store[word] = order
        if (self.last_store[word] != order).any():
            raise EmulationError("race in shared memory: two threads store to one word")
        self.writer[word] = thread
        self.write_time[:, word] = now
        self.epoch[word] = len(self.publishes)

    def write(self, thread, address, values, block=None):
        """Stores ``values [n, count]``, one row for each thread; ``block`` as in ``words``."""
        word = self.words(thread, address, values.shape[1], "store", block)
        self.touch(thread[:, None], word)
        self.data[word] = values

    def set_bits(self, thread, address, bits):
        """Sets bits of one word for each thread. Several threads may change a word without a barrier."""
        word = self.words(thread, address, 1, "or_shared")[:, 0]
        if (self.writer[word] < 0).any():
            raise EmulationError("or_shared in shared memory that no store has written")
        now = self.now(thread)
        self._check_writers(thread, now, word, "or_shared after")
        self._check(thread, now, self.reader[word], self.read_time, word, "or_shared after")
        np.bitwise_or.at(self.data, word, bits)
        self.set_time[word] = self.block_time[thread // self.threads]

    def expect(self, thread, word):
        """Records that an asynchronous copy into ``word [n, count]`` has started: nothing may read it yet."""
        self.touch(thread[:, None], word)
        self.writer[word] = COPY

    def arrive(self, thread, word, values):
        """Completes a copy of ``values`` into ``word [n, count]`` that ``thread`` has waited for."""
        self.data[word] = values
        self.writer[word] = thread[:, None]
        self.write_time[:, word] = self.now(thread[:, None])
        self.epoch[word] = len(self.publishes)

    def arrive_box(self, word, values, number, time):
        """Completes a copy of a box into ``word``, whose arrival barrier has a number, at a time."""
        self.data[word] = values
        self.writer[word] = ARRIVED
        self.arrival[0, word], self.arrival[1, word] = number, time

    def publish(self, active):
        """Records that the ``active`` threads publish what they wrote, for products of warpgroups."""
        self.publishes.append((active, self.now(np.arange(len(active)))))

    def read_operands(self, thread, address, count):
        """Loads words as ``read`` does, for a product of warpgroups: their writers must have published."""
        values = self.read(thread, address, count)
        word = self.words(thread, address, count, "product").reshape(-1)
        stored = self.writer[word] >= 0
        word, thread = word[stored], np.repeat(thread, count)[stored]
        writer, event = self.writer[word], self.epoch[word]
        while word.size:
            if (event == len(self.publishes)).any():
                raise EmulationError(
                    "a product of warpgroups reads what its writer has not published: publish_operands first"
                )
            later = np.ones(word.size, bool)
            for e in np.unique(event):
                active, time = self.publishes[e]
                first = (event == e) & active[writer]
                reading, published = thread[first], writer[first]
                now = self.now(reading)
                self._check(reading, now, published, time, published, "product after the publishing of")
                later[first] = False
            thread, word, writer, event = thread[later], word[later], writer[later], event[later] + 1
        return values
