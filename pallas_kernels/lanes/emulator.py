"""The back end that executes lane instructions on NumPy: all threads of all CTAs in lockstep.

It runs a lane program without a GPU, and is stricter than a GPU. It raises ``EmulationError`` for:

- an access that is out of bounds or not aligned;
- a load of shared memory that nothing has written;
- a race: an access to shared memory that another thread wrote, or a store to shared memory that another
  thread read, without a barrier in between;
- data of an asynchronous copy that is used before a wait, and a copy that is never waited for;
- a product of warpgroups of operands that their writers have not published (``publish_operands``) before a
  barrier, and sums of a queued product that are used before it is finished, or never finished;
- a warp instruction that only some lanes of a warp reach.

It does not model memory ordering between CTAs (no kernel depends on it), timing or register pressure.
"""

import contextlib
import threading
import time

import ml_dtypes
import numpy as np

from pallas_kernels.lanes.emulated_copies import AsynchronousCopies
from pallas_kernels.lanes.emulated_matrix_unit import MatrixUnit
from pallas_kernels.lanes.emulated_memory import EmulationError, GlobalMemory, SharedMemory
from pallas_kernels.lanes.emulated_registers import DTYPE, LaneValue
from pallas_kernels.lanes.instructions import LANES

WAIT_SECONDS = 20
"""Time after which ``wait_flagged`` gives up."""
# An access with a flag is one access. Numpy copies bytes, and other threads run while it copies.
_flagged_access = threading.Lock()


class NumpyInstructions(MatrixUnit, AsynchronousCopies):
    """Executes a lane program for all threads at once. ``array`` returns the refs to global memory."""

    def __init__(self, *, blocks: int, threads: int, shared_bytes: int, cluster: int = 1, seed: int = 0):
        """Starts a grid of CTAs (see ``launch.lane_kernel``). Shared memory holds noise."""
        self.total = blocks * threads
        self.threads, self.cluster = threads, cluster
        self.rng = np.random.default_rng(seed)
        self.shared = SharedMemory(blocks, threads, shared_bytes, self.rng, cluster)
        self.unordered_stores = np.zeros(blocks // cluster, bool)
        self.masks = [np.ones(self.total, bool)]
        self.memory = GlobalMemory()
        self.phases = {}
        self.open_copies: list[list] = [[] for _ in range(self.total // LANES)]
        self.copy_groups: list[list] = [[] for _ in range(self.total // LANES)]

    def array(self, array: np.ndarray) -> int:
        """Puts a contiguous array into global memory and returns its ref. Stores change it in place."""
        return self.memory.add(array)

    def finish(self) -> None:
        """Raises EmulationError if copies, products, or stores to other CTAs have no wait after them."""
        if any(self.open_copies) or any(self.copy_groups):
            raise EmulationError(
                "the program ends with asynchronous copies that were not waited for: call wait_copies(0)"
            )
        if any(phase.copies for phase in self.phases.values()):
            raise EmulationError("the program ends with copies of boxes that no warp has waited for")
        if self.queued is not None:
            raise EmulationError("the program ends with a queued product that it has not finished")
        if self.unordered_stores.any():
            raise EmulationError(
                "a store to another CTA has no cluster_barrier after it: the CTA may have ended"
            )

    # --- helpers ---------------------------------------------------------------------------------
    @property
    def _mask(self):
        return self.masks[-1]

    def _active(self):
        return np.flatnonzero(self._mask)

    def _warps(self, instruction):
        """Returns the indices of the active warps; raises if only some lanes of a warp are active."""
        lanes = self._mask.reshape(-1, LANES)
        if (lanes.any(1) != lanes.all(1)).any():
            raise EmulationError(
                f"{instruction} reached by only part of a warp: keep it out of divergent `when`s"
            )
        return np.flatnonzero(lanes[:, 0])

    def _load(self, address, count):
        """Loads ``[threads, count]`` bytes; inactive threads get noise."""
        out = self.rng.integers(0, 256, (self.total, count), dtype=np.uint8)
        active = self._active()
        if active.size:
            array, index = self.memory.locate(address.data[active], count, "global load")
            out[active] = array[index]
        return out

    def _by_warp(self, value, function):
        """Applies ``function`` to a register as ``[warps, 32]``; its result is broadcast over the lanes."""
        self._warps("a warp instruction")
        out = function(value.data.reshape(-1, LANES))
        return LaneValue(np.broadcast_to(out, (self.total // LANES, LANES)).reshape(-1), value.kind)

    # --- constants, indices, addresses -----------------------------------------------------------
    def constant(self, value, kind="i32"):
        if kind == "i32":
            value = np.uint32(int(value) & 0xFFFFFFFF).view(np.int32)
        return LaneValue(np.full(self.total, value), kind)

    def thread_index(self):
        return LaneValue(np.arange(self.total) % self.threads, "i32")

    def block_index(self):
        return LaneValue(np.arange(self.total) // self.threads, "i32")

    def global_address(self, ref):
        return self.constant(self.memory.address(ref), "i64")

    def shared_address(self, ref):
        return self.constant(0)

    # --- registers -------------------------------------------------------------------------------
    def select(self, condition, yes, no):
        return LaneValue(np.where(condition.data, yes.data, no.data), yes.kind)

    def bits_to_float(self, word):
        return LaneValue(word.data.view(np.float32), "f32")

    def float_to_bits(self, number):
        return LaneValue(number.data.view(np.int32), "i32")

    def int_to_float(self, number):
        return LaneValue(number.data.astype(np.float32), "f32")

    def half_to_float(self, word, half):
        halves = word.data.view(np.float16).reshape(-1, 2)
        return LaneValue(halves[:, {"low": 0, "high": 1}[half]].astype(np.float32), "f32")

    def widen(self, word):
        return LaneValue(word.data.view(np.uint32).astype(np.int64), "i64")

    def absolute(self, number):
        return LaneValue((number.data.view(np.uint32) & 0x7FFFFFFF).view(np.float32), "f32")

    def multiply_add(self, a, b, c):
        if a.kind == "i32":
            return a * b + c
        with np.errstate(all="ignore"):
            exact = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
            return LaneValue(exact.astype(np.float32), "f32")

    def divide(self, a, b):
        with np.errstate(all="ignore"):
            return LaneValue(a.data / b.data, "f32")

    def reciprocal(self, x):
        smallest = np.finfo(np.float32).tiny
        with np.errstate(all="ignore"):
            result = 1 / np.where(np.abs(x.data) < smallest, np.copysign(np.float32(0), x.data), x.data)
            zero = np.copysign(np.float32(0), result)
            return LaneValue(np.where(np.abs(result) < smallest, zero, result), "f32")

    def exp2(self, x):
        with np.errstate(all="ignore"):
            return LaneValue(np.exp2(x.data), "f32")

    def rsqrt(self, x):
        with np.errstate(all="ignore"):
            return LaneValue(1 / np.sqrt(x.data), "f32")

    def pack_bfloat16(self, low, high):
        # Integer arithmetic on the bits would turn some NaNs into numbers.
        with np.errstate(all="ignore"):  # signalling NaNs among them
            halves = np.stack([low.data, high.data], 1).astype(ml_dtypes.bfloat16)
        return LaneValue(halves.view(np.int32)[:, 0], "i32")

    def multiply_add_bfloat16(self, a, b, c):
        x, y, z = (register.data.view(ml_dtypes.bfloat16).astype(np.float64) for register in (a, b, c))
        with np.errstate(all="ignore"):
            fraction, exponent = np.frexp(x * y + z)
            rounded = np.ldexp(np.rint(fraction * 256), exponent - 8)  # 8 significant bits, ties to even
            return LaneValue(rounded.astype(ml_dtypes.bfloat16).view(np.int32), "i32")

    def maximum(self, a, b):
        return LaneValue(np.maximum(a.data.view(np.uint32), b.data.view(np.uint32)).view(np.int32), "i32")

    def count_bits(self, word):
        return LaneValue(np.bitwise_count(word.data.view(np.uint32)), "i32")

    def permute_bytes(self, low, high, selector):
        selector = selector if isinstance(selector, LaneValue) else self.constant(selector)
        source = np.stack([low.data, high.data], 1).view(np.uint8)
        index = (selector.data[:, None] >> (4 * np.arange(4))) & 7
        return LaneValue(np.take_along_axis(source, index, 1).view(np.int32)[:, 0], "i32")

    def select_bits(self, mask, yes, no):
        return ((yes ^ no) & self.constant(mask)) ^ no

    # --- memory ----------------------------------------------------------------------------------
    def load_global(self, address, count=1, kind="i32", *, ordered=False, evict_first=False):
        words = self._load(address, 4 * count).view(DTYPE[kind])
        return [LaneValue(words[:, i], kind) for i in range(count)]

    def load_global_16(self, address):
        return LaneValue(self._load(address, 2).view(np.uint16)[:, 0].astype(np.int32), "i32")

    def store_global(self, address, values):
        active = self._active()
        if active.size:
            array, index = self.memory.locate(address.data[active], 4 * len(values), "global store")
            array[index] = np.stack([v.data for v in values], 1)[active].view(np.uint8)

    def store_flagged(self, address, numbers, flag):
        words = [self.float_to_bits(number) for number in numbers]
        with _flagged_access:
            self.store_global(address, [words[0], flag, words[1], flag])

    def wait_flagged(self, address, flag):
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with _flagged_access:
                words = self._load(address, 16).view(np.int32)
            if (words[self._mask][:, 1::2] == flag.data[self._mask, None]).all():
                return [LaneValue(words[:, i].view(np.float32), "f32") for i in (0, 2)]
            if time.monotonic() > deadline:
                raise EmulationError(f"no lane has stored the flag in {WAIT_SECONDS} s")
            time.sleep(1e-4)  # Another device runs in another thread.

    def trap_unless(self, condition):
        if not condition.data[self._mask].all():
            raise EmulationError("the condition of a trap_unless does not hold")

    def load_shared(self, address, count=1, kind="i32"):
        words = self.rng.integers(0, 2**32, (self.total, count), dtype=np.uint32)
        active = self._active()
        if active.size:
            words[active] = self.shared.read(active, address.data[active].astype(np.int64), count)
        return [LaneValue(words[:, i].copy().view(DTYPE[kind]), kind) for i in range(count)]

    def store_shared(self, address, values, where=None):
        active = np.flatnonzero(self._mask if where is None else self._mask & where.data)
        if active.size:
            words = np.stack([v.data.view(np.uint32) for v in values], 1)[active]
            self.shared.write(active, address.data[active].astype(np.int64), words)

    def or_shared(self, address, value, where=None):
        active = np.flatnonzero(self._mask if where is None else self._mask & where.data)
        if active.size:
            bits = value.data.view(np.uint32)[active]
            self.shared.set_bits(active, address.data[active].astype(np.int64), bits)

    def store_cluster(self, address, rank, values):
        active = self._active()
        if active.size:
            cluster = active // (self.threads * self.cluster)
            self.unordered_stores[cluster] = True
            words = np.stack([v.data.view(np.uint32) for v in values], 1)[active]
            block = cluster * self.cluster + rank
            self.shared.write(active, address.data[active].astype(np.int64), words, block)

    def load_matrices_transposed(self, address, *, unwritten=False):
        rows = np.zeros((self.total, 4), np.uint32)
        threads = (self._warps("load_matrices_transposed")[:, None] * LANES + np.arange(LANES)).reshape(-1)
        rows[threads] = self.shared.read(threads, address.data[threads].astype(np.int64), 4, unwritten)
        matrices = rows.view(np.uint16).reshape(-1, 4, 8, 8)  # [warp, matrix, row, element]
        # Element [matrix, 2 column + half, row] goes to register `matrix` of lane 4 row + column.
        pairs = matrices.reshape(-1, 4, 4, 2, 8).transpose(1, 0, 4, 2, 3)
        return [LaneValue(np.ascontiguousarray(m).view(np.int32).reshape(-1), "i32") for m in pairs]

    # --- warp and CTA ----------------------------------------------------------------------------
    def block_barrier(self):
        self._pass_barrier(self._whole(self.threads, "block_barrier", "a CTA"))

    def cluster_barrier(self):
        clusters = self._whole(self.threads * self.cluster, "cluster_barrier", "a cluster")
        self.unordered_stores[clusters] = False
        self.shared.cluster_time[clusters] += 1
        self._pass_barrier(np.repeat(clusters, self.cluster))

    def _whole(self, threads, instruction, unit):
        """Returns which groups of ``threads`` threads are active; raises if only a part of one is."""
        groups = self._mask.reshape(-1, threads)
        if (groups.any(1) != groups.all(1)).any():
            raise EmulationError(
                f"{instruction} reached by only part of {unit}: keep it out of divergent `when`s"
            )
        return groups[:, 0]

    def _pass_barrier(self, blocks):
        self.shared.block_time[blocks] += 1
        self.shared.warp_time[np.repeat(blocks, self.threads // LANES)] += 1

    def warp_barrier(self):
        self.shared.warp_time[self._warps("warp_barrier")] += 1

    def shuffle_xor(self, value, mask):
        return self._by_warp(value, lambda v: v[:, np.arange(LANES) ^ mask])

    def ballot(self, condition):
        self._warps("a warp instruction")
        lanes = condition.data.reshape(-1, LANES).astype(np.uint64) << np.arange(LANES, dtype=np.uint64)
        return LaneValue(np.repeat(lanes.sum(1).astype(np.uint32).view(np.int32), LANES), "i32")

    def lower_lanes(self):
        mask = (1 << (np.arange(self.total, dtype=np.int64) % LANES)) - 1
        return LaneValue(mask.astype(np.int32), "i32")

    def reduce_max(self, value):
        return self._by_warp(value, lambda v: v.view(np.uint32).max(1, keepdims=True).view(np.int32))

    def reduce_add(self, value):
        return self._by_warp(value, lambda v: v.sum(1, dtype=np.int32, keepdims=True))

    # --- control ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def when(self, condition):
        with self._as_active(self._mask & condition.data):
            yield

    def loop(self, count, carry, body):
        counts = count.data.reshape(-1, LANES)
        if (counts != counts[:, :1]).any():
            raise EmulationError("the loop count differs within a warp")
        i = 0
        while (running := self._mask & (i < count.data)).any():
            self.masks.append(running)
            new = body(self.constant(i), carry)
            self.masks.pop()
            carry = [
                LaneValue(np.where(running, n.data, o.data), o.kind) for n, o in zip(new, carry, strict=True)
            ]
            i += 1
        return list(carry)
