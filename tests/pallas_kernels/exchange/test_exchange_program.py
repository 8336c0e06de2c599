"""The sum over devices, each emulated in a thread, that run at different speeds."""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_rows.program import AddNormRefs, Shape, add_norm_program
from pallas_kernels.exchange.program import (
    INDEX_WORD,
    ExchangeRefs,
    Layout,
    exchange_add_norm_program,
    exchange_program,
)
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
        """Runs the exchange of one device; returns the sum."""
        shape = shape_of(partials, features, terms)
        isa = self.launch(shape)
        total = np.full((shape.rows.rows, features), np.nan, np.float32)
        exchange_program(
            isa, self.layout, shape, ExchangeRefs(isa.array(partials), index + 1, isa.array(total))
        )
        isa.finish()
        return total

    def exchange_add_norm(
        self, index: int, partials: np.ndarray, x: np.ndarray, norm_scale: np.ndarray, terms: int = 1
    ) -> list[np.ndarray]:
        """Runs the exchange with a norm of one device; returns the outputs of ``AddNormRefs``."""
        shape = shape_of(partials, x.shape[1], terms)
        isa = self.launch(shape)
        outputs = outputs_of(shape)
        arrays = (isa.array(array) for array in (x, partials, norm_scale, *outputs))
        exchange_add_norm_program(isa, self.layout, shape, AddNormRefs(*arrays, shared=None), index + 1)
        isa.finish()
        return outputs

    def launch(self, shape: Shape) -> NumpyInstructions:
        """Starts a program whose first arrays are the mailboxes, at the addresses that these hold."""
        isa = launched(shape)
        for mailbox in self.arrays:
            isa.array(mailbox)
        return isa


def launched(shape: Shape) -> NumpyInstructions:
    rows = shape.rows
    return NumpyInstructions(blocks=rows.blocks, threads=rows.threads, shared_bytes=rows.shared_bytes)


def shape_of(partials: np.ndarray, features: int, terms: int) -> Shape:
    count, rows, stored = partials.shape
    return Shape(Rows(rows, features), count, stored // terms, terms)


def outputs_of(shape: Shape) -> list[np.ndarray]:
    """Returns the outputs of ``AddNormRefs``, filled with NaN."""
    rows = shape.rows
    values = [np.full((rows.rows, rows.features), np.nan, jnp.bfloat16) for _ in range(2)]
    return [*values, np.full((rows.rows, rows.blocks_per_row), np.nan, np.float32)]


def add_norm(x, partials, norm_scale) -> list[np.ndarray]:
    """Runs the program of one device without an exchange; returns the outputs of ``AddNormRefs``."""
    shape = shape_of(partials, x.shape[1], 1)
    isa, outputs = launched(shape), outputs_of(shape)
    arrays = (isa.array(array) for array in (x, partials, norm_scale, *outputs))
    add_norm_program(isa, shape, AddNormRefs(*arrays, shared=None))
    isa.finish()
    return outputs


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


def run_devices(count: int, calls: list[Callable[[int], Any]]) -> list[list[Any]]:
    """Runs the calls of each device in a thread, with random pauses; returns their results by device."""
    delays = np.random.default_rng(1).choice([0, 0, 0.02, 0.05], (count, len(calls)))
    results: list[list[Any]] = [[] for _ in range(count)]

    def run(index):
        for delay, call in zip(delays[index], calls, strict=True):
            time.sleep(delay)
            results[index].append(call(index))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def summed_on_all_devices(parts, features, terms):
    total = summed_on_one_device(parts[0], features, terms)
    for part in parts[1:]:
        total = total + summed_on_one_device(part, features, terms)
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
    calls = [
        lambda index, part=part: boxes.exchange(index, part[index], features, terms) for part in partials
    ]
    sums = run_devices(devices, calls)
    for i in range(exchanges):
        expected = summed_on_all_devices(partials[i], features, terms)
        for index in range(devices):
            np.testing.assert_array_equal(sums[index][i], expected)


@pytest.mark.parametrize(("devices", "features", "terms"), [(2, 600, 1), (4, 300, 2)])
def test_an_exchange_with_a_norm_gives_the_bits_of_two_launches(devices, features, terms):
    """Exchanges with and without a norm share the mailbox, as in a model with norms after its blocks."""
    rng, exchanges = np.random.default_rng(0), 6
    boxes = Devices(Layout(devices, Rows(16, features)))
    cases: list[tuple[list[np.ndarray], np.ndarray, np.ndarray]] = []
    for rows in (1, 16, 2, 1, 3, 1):
        partials = [random_partials(rng, rows, features, terms) for _ in range(devices)]
        x = np.array(jnp.asarray(rng.standard_normal((rows, features)), jnp.bfloat16))
        cases.append((partials, x, np.array(jnp.asarray(rng.uniform(0.5, 1.5, features), jnp.bfloat16))))

    def call(i):
        partials, x, norm_scale = cases[i]
        if i == 3:
            return lambda index: boxes.exchange(index, partials[index], features, terms)
        return lambda index: boxes.exchange_add_norm(index, partials[index], x, norm_scale, terms)

    results = run_devices(devices, [call(i) for i in range(exchanges)])
    for i, (partials, x, norm_scale) in enumerate(cases):
        total = summed_on_all_devices(partials, features, terms)
        expected = total if i == 3 else add_norm(x, total[None], norm_scale)
        for index in range(devices):
            for actual, wanted in zip(results[index][i], expected, strict=True):
                np.testing.assert_array_equal(actual, wanted)


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
