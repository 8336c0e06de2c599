"""The sum over devices, each emulated in a thread, that run at different speeds."""

import threading
import time

import numpy as np
import pytest

from pallas_kernels.decode_rows.program import Shape
from pallas_kernels.exchange.program import INDEX_WORD, ExchangeRefs, Layout, exchange_program
from pallas_kernels.lanes.emulated_memory import EmulationError
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.lanes.rows import Rows


class Devices:
    """Opened mailboxes of several devices, whose memory has one address space."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.arrays = [np.zeros(layout.words, np.int32) for _ in range(layout.devices)]
        addresses = (np.arange(layout.devices, dtype=np.int64) + 1) << 40
        for index, mailbox in enumerate(self.arrays):
            mailbox[: 2 * layout.devices] = addresses.view(np.int32)
            mailbox[INDEX_WORD] = index

    def exchange(self, index: int, partials: np.ndarray, features: int, terms: int = 1) -> np.ndarray:
        """Runs the program of one device; returns the sum."""
        count, rows, stored = partials.shape
        shape = Shape(Rows(rows, features), count, stored // terms, terms)
        rows = shape.rows
        isa = NumpyInstructions(blocks=rows.blocks, threads=rows.threads, shared_bytes=rows.shared_bytes)
        for mailbox in self.arrays:  # Their addresses are those that the mailboxes hold.
            isa.array(mailbox)
        total = np.full((rows.rows, features), np.nan, np.float32)
        refs = ExchangeRefs(isa.array(partials), index + 1, isa.array(total))
        exchange_program(isa, self.layout, shape, refs)
        isa.finish()
        return total


def random_partials(rng, rows, features, terms):
    stored = -(-features // 256) * 256
    partials = np.full((3, rows, terms, stored), np.nan, np.float32)
    partials[..., :features] = rng.standard_normal((3, rows, terms, features))
    return partials.reshape(3, rows, terms * stored)


def summed_on_one_device(partials, features, terms):
    parts = partials.reshape(*partials.shape[:2], terms, -1)[..., :features]
    total = np.zeros(())
    for term in parts.swapaxes(1, 2).reshape(-1, parts.shape[1], features):
        total = term if total.ndim == 0 else total + term
    return total


@pytest.mark.parametrize(("devices", "features", "terms"), [(2, 600, 1), (4, 300, 2)])
def test_all_devices_get_the_same_sums_however_fast_they_run(devices, features, terms):
    """Some exchanges have fewer rows than the mailbox. A device may be one exchange ahead of another."""
    rng, exchanges = np.random.default_rng(0), 8
    boxes = Devices(Layout(devices, Rows(3, features)))
    partials = [
        [random_partials(rng, (3, 1)[i % 3 == 1], features, terms) for _ in range(devices)]
        for i in range(exchanges)
    ]
    delays = rng.choice([0, 0, 0.02, 0.05], (devices, exchanges))
    sums: list[list[np.ndarray]] = [[] for _ in range(devices)]

    def run(index):
        for i in range(exchanges):
            time.sleep(delays[index, i])
            sums[index].append(boxes.exchange(index, partials[i][index], features, terms))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(exchanges):
        expected = summed_on_one_device(partials[i][0], features, terms)
        for part in partials[i][1:]:
            expected = expected + summed_on_one_device(part, features, terms)
        for index in range(devices):
            np.testing.assert_array_equal(sums[index][i], expected)


def test_a_device_waits_for_the_others(monkeypatch):
    monkeypatch.setattr("pallas_kernels.lanes.emulator.WAIT_SECONDS", 0.05)
    boxes = Devices(Layout(2, Rows(1, 256)))
    with pytest.raises(EmulationError, match="no lane has stored the flag"):
        boxes.exchange(0, np.zeros((1, 1, 256), np.float32), 256)


def test_a_mailbox_that_moved_is_noticed():
    boxes = Devices(Layout(2, Rows(1, 256)))
    boxes.arrays[0][0:2] = boxes.arrays[0][2:4]
    with pytest.raises(EmulationError, match="trap_unless"):
        boxes.exchange(0, np.zeros((1, 1, 256), np.float32), 256)
