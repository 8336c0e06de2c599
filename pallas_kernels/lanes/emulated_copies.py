"""The emulator's asynchronous copies, and the barriers on which boxes arrive."""

import abc
import dataclasses

import numpy as np

from pallas_kernels.lanes.emulated_memory import EmulationError, GlobalMemory, SharedMemory
from pallas_kernels.lanes.instructions import LANES, Instructions


@dataclasses.dataclass
class Phase:
    """The current phase of an arrival barrier.

    Attributes:
      number: Number of the barrier; barriers with one address in different CTAs share it.
      ended: Number of phases that have ended.
      expected: Bytes that the phase expects; None if no lane has said so.
      copies: Words and values of its copies.
    """

    number: int
    ended: int = 0
    expected: int | None = None
    copies: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def copied(self) -> int:
        """Bytes of the copies."""
        return sum(values.nbytes for _, values in self.copies)


class AsynchronousCopies(Instructions):
    """The instructions that copy to shared memory, for all threads of an emulated grid.

    A copy arrives as late as it may: when a warp waits for it.

    Attributes:
      threads: Number of threads of a CTA.
      memory, shared: Global memory, and the shared memory of all CTAs.
      masks: Stack of the active threads.
      open_copies, copy_groups: For each warp, copies of the open group, and the groups that are closed.
      phases: Phases of the arrival barriers, by CTA and address.
      waits: Number of ``wait_arrival`` so far.
    """

    threads: int
    memory: GlobalMemory
    shared: SharedMemory
    masks: list[np.ndarray]
    open_copies: list[list]
    copy_groups: list[list[list]]
    phases: dict[tuple[int, int], Phase]
    waits: int = 0

    @abc.abstractmethod
    def _warps(self, instruction: str) -> np.ndarray:
        """Returns the indices of the active warps; raises if only some lanes of a warp are active."""

    def copy_async(self, shared, source, *, evict_first=False, where=None):
        active = np.flatnonzero(self.masks[-1] if where is None else self.masks[-1] & where.data)
        if not active.size:
            return
        array, index = self.memory.locate(source.data[active], 16, "asynchronous copy")
        word = self.shared.words(active, shared.data[active].astype(np.int64), 4, "asynchronous copy")
        self.shared.expect(active, word)
        values = array[index].view(np.uint32)
        for warp in np.unique(active // LANES):
            mine = active // LANES == warp
            self.open_copies[warp].append((active[mine], word[mine], values[mine]))

    def commit_copies(self):
        for warp in self._warps("commit_copies"):
            self.copy_groups[warp].append(self.open_copies[warp])
            self.open_copies[warp] = []

    def wait_copies(self, pending):
        for warp in self._warps("wait_copies"):
            while len(self.copy_groups[warp]) > pending:
                for thread, word, values in self.copy_groups[warp].pop(0):
                    self.shared.arrive(thread, word, values)

    def start_arrivals(self, barrier):
        for thread, address in self._active_lanes(barrier):
            self.shared.write(np.array([thread]), np.array([address]), np.zeros((1, 2), np.uint32))
            known = {a: phase.number for (_, a), phase in self.phases.items()}
            number = known.get(address, len(self.shared.waited))
            if number == len(self.shared.waited):
                self.shared.waited.append(np.full(len(self.shared.warp_time), -1))
            self.phases[thread // self.threads, address] = Phase(number)

    def expect_bytes(self, barrier, count):
        for thread, address in self._active_lanes(barrier):
            phase = self._phase(thread, address)
            if phase.expected is not None:
                raise EmulationError("two expect_bytes in one phase of an arrival barrier")
            phase.expected = count

    def copy_box(self, shared, ref, corner, box, barrier, *, evict_first=False):
        for thread, address in self._active_lanes(shared):
            values = self.memory.box(ref, box, [int(index.data[thread]) for index in corner])
            pieces = box[-1] * values.itemsize // 16
            if pieces not in (4, 8):
                raise EmulationError(f"the rows of a box have 64 or 128 bytes, not {16 * pieces}")
            if address % (128 * pieces):
                raise EmulationError(f"the address {address} of a box is not a multiple of 8 rows")
            row, piece = np.divmod(np.arange(values.nbytes // 16), pieces)
            place = row * pieces + (piece ^ row * pieces // 8 % pieces)
            threads, addresses = np.full(len(place), thread), address + 16 * place
            word = self.shared.words(threads, addresses, 4, "copy of a box").reshape(1, -1)
            self.shared.expect(np.array([thread]), word)
            phase = self._phase(thread, int(barrier.data[thread]))
            phase.copies.append((word[0], values.reshape(-1).view(np.uint32)))

    def wait_arrival(self, barrier, parity):
        self.waits += 1
        for warp in self._warps("wait_arrival"):
            thread = int(warp) * LANES
            key = thread // self.threads, int(barrier.data[thread])
            phase = self._phase(thread, key[1])
            if phase.ended % 2 == parity.data[thread]:
                if phase.expected != phase.copied:
                    expected = phase.expected or 0
                    raise EmulationError(
                        f"a wait never ends: {expected} bytes expected, {phase.copied} copied"
                    )
                for word, values in phase.copies:
                    self.shared.arrive_box(word, values, phase.number, self.waits)
                self.phases[key] = Phase(phase.number, phase.ended + 1)
            self.shared.waited[phase.number][warp] = self.waits

    def _phase(self, thread, address):
        """Returns the phase of an arrival barrier that the thread uses."""
        key = thread // self.threads, address
        if key not in self.phases:
            raise EmulationError("use of an arrival barrier that start_arrivals has not made")
        self.shared.read(np.array([thread]), np.array([address]), 2)
        return self.phases[key]

    def _active_lanes(self, address):
        """Returns the active threads and their addresses."""
        return [(int(thread), int(address.data[thread])) for thread in np.flatnonzero(self.masks[-1])]
