"""The emulator's memory: loads, stores, copies and barriers against their specification, and races."""

import threading
import time

import numpy as np
import pytest
from one_cta import THREADS, WARPS, new_isa

from pallas_kernels.lanes.emulated_memory import EmulationError
from pallas_kernels.lanes.emulator import LaneValue, NumpyInstructions


def test_global_memory(isa, rng):
    source = rng.integers(0, 2**31, 4 * THREADS).astype(np.int32)
    target = np.zeros_like(source)
    thread = isa.thread_index()
    words = isa.load_global(isa.global_address(isa.array(source)) + isa.widen(thread << 4), 4)
    isa.store_global(isa.global_address(isa.array(target)) + isa.widen(thread << 4), words)
    np.testing.assert_array_equal(target, source)
    halves = isa.load_global_16(isa.global_address(1) + isa.widen(thread << 1))
    np.testing.assert_array_equal(halves.data, source.view(np.uint16)[:THREADS])


def test_shared_memory_and_predicates(isa):
    thread = isa.thread_index()
    isa.store_shared(thread << 2, [thread])
    isa.store_shared(thread << 2, [thread + 100], where=thread < 5)
    with isa.when(thread >= 60):
        isa.store_shared(thread << 2, [thread + 200])
    expected = np.arange(THREADS) + np.where(np.arange(THREADS) < 5, 100, 0)
    expected[60:] += 200
    np.testing.assert_array_equal(isa.load_shared(thread << 2)[0].data, expected)


def test_lanes_set_bits_of_one_word(isa):
    thread = isa.thread_index()
    isa.store_shared(thread << 2, [isa.constant(1 << 30)])
    with pytest.raises(EmulationError, match="race"):
        isa.or_shared((thread >> 5) << 2, isa.constant(1))
    isa.block_barrier()
    isa.or_shared((thread >> 5) << 2, isa.constant(1) << (thread & 31), where=(thread & 31) < 4)
    with pytest.raises(EmulationError, match="another thread set bits"):
        isa.load_shared(thread << 2)
    isa.block_barrier()
    words = isa.load_shared(thread << 2)[0].data
    np.testing.assert_array_equal(words, np.where(np.arange(THREADS) < WARPS, 1 << 30 | 15, 1 << 30))


def test_refuses_to_set_bits_of_a_word_that_nothing_has_written(isa):
    with pytest.raises(EmulationError, match="no store has written"):
        isa.or_shared(isa.constant(0), isa.constant(1))


def test_loads_matrices_that_nothing_has_written_if_told(isa):
    thread = isa.thread_index()
    isa.load_matrices_transposed(thread << 4, unwritten=True)
    source = isa.global_address(isa.array(np.zeros(4 * THREADS, np.int32)))
    isa.block_barrier()
    isa.copy_async(thread << 4, source, where=thread < 1)
    with pytest.raises(EmulationError, match="a copy is still writing"):
        isa.load_matrices_transposed(thread << 4, unwritten=True)


def test_load_matrices_transposed(isa, rng):
    elements = rng.integers(0, 2**16, (WARPS, 4, 8, 8)).astype(np.uint16)  # [warp, matrix, row, element]
    words = elements.view(np.int32).reshape(THREADS, 4)
    thread = isa.thread_index()
    isa.store_shared(thread << 4, [LaneValue(words[:, i], "i32") for i in range(4)])
    isa.warp_barrier()
    registers = isa.load_matrices_transposed(thread << 4)
    for warp in range(WARPS):
        for matrix in range(4):
            got = registers[matrix].data.view(np.uint16).reshape(WARPS, 8, 4, 2)[warp]
            for row in range(8):
                for column in range(4):
                    expected = elements[warp, matrix, 2 * column : 2 * column + 2, row]
                    np.testing.assert_array_equal(got[row, column], expected)


def copies(isa, wait: int):
    source = np.arange(4 * THREADS, dtype=np.int32)
    thread = isa.thread_index()
    isa.copy_async(thread << 4, isa.global_address(isa.array(source)) + isa.widen(thread << 4))
    isa.commit_copies()
    isa.wait_copies(wait)
    return isa.load_shared(thread << 4, 4)


def test_asynchronous_copies_arrive_at_the_wait(isa):
    words = copies(isa, 0)
    np.testing.assert_array_equal(words[3].data, 4 * np.arange(THREADS) + 3)
    isa.finish()


def test_refuses_copies_read_before_the_wait(isa):
    with pytest.raises(EmulationError, match="nothing has written"):
        copies(isa, 1)


def test_refuses_copies_that_are_never_waited_for(isa):
    thread = isa.thread_index()
    source = isa.array(np.zeros(4 * THREADS, np.int32))
    isa.copy_async(thread << 4, isa.global_address(source) + isa.widen(thread << 4))
    with pytest.raises(EmulationError, match="not waited for"):
        isa.finish()


def neighbour(isa):
    return (isa.thread_index() ^ 1) << 2


def test_refuses_a_load_of_another_lane_s_store_without_a_barrier(isa):
    isa.store_shared(isa.thread_index() << 2, [isa.thread_index()])
    with pytest.raises(EmulationError, match="race"):
        isa.load_shared(neighbour(isa))


def test_a_warp_barrier_orders_a_warp_but_not_the_cta(isa):
    thread = isa.thread_index()
    isa.store_shared(thread << 2, [thread])
    isa.warp_barrier()
    np.testing.assert_array_equal(isa.load_shared(neighbour(isa))[0].data, np.arange(THREADS) ^ 1)
    with pytest.raises(EmulationError, match="race"):
        isa.load_shared((thread ^ 32) << 2)


def test_ctas_of_a_cluster_store_to_each_other():
    isa = NumpyInstructions(blocks=4, threads=32, shared_bytes=256, cluster=2)
    thread, block = isa.thread_index(), isa.block_index()
    isa.store_cluster((block & 1) * 128 + (thread << 2), 1, [thread + block * 100])
    with pytest.raises(EmulationError, match="no cluster_barrier after it"):
        isa.finish()
    isa.cluster_barrier()
    isa.finish()
    with isa.when((block & 1).equals(1)):
        (first,), (second,) = (isa.load_shared((thread << 2) + 128 * rank) for rank in range(2))
    lanes = np.arange(32)
    for cluster in range(2):
        threads = slice(64 * cluster + 32, 64 * cluster + 64)
        np.testing.assert_array_equal(first.data[threads], lanes + 200 * cluster)
        np.testing.assert_array_equal(second.data[threads], lanes + 200 * cluster + 100)


def test_a_block_barrier_does_not_order_a_cluster():
    isa = NumpyInstructions(blocks=2, threads=32, shared_bytes=128, cluster=2)
    thread, block = isa.thread_index(), isa.block_index()
    with isa.when(block.equals(0)):
        isa.store_cluster(thread << 2, 1, [thread])
    isa.block_barrier()
    with isa.when(block.equals(1)), pytest.raises(EmulationError, match="race"):
        isa.load_shared(thread << 2)
    with (
        isa.when(block.equals(0)),
        pytest.raises(EmulationError, match="cluster_barrier reached by only part"),
    ):
        isa.cluster_barrier()


def test_a_block_barrier_orders_the_cta(isa):
    thread = isa.thread_index()
    isa.store_shared(thread << 2, [thread])
    isa.block_barrier()
    np.testing.assert_array_equal(isa.load_shared((thread ^ 32) << 2)[0].data, np.arange(THREADS) ^ 32)
    with pytest.raises(EmulationError, match="race"):
        isa.store_shared(thread << 2, [thread])


@pytest.mark.parametrize(
    ("access", "message"),
    [
        (lambda isa: isa.load_shared(isa.constant(2)), "not aligned"),
        (lambda isa: isa.load_shared(isa.constant(4096)), "outside of the 4096 bytes"),
        (lambda isa: isa.load_shared(isa.constant(0)), "nothing has written"),
        (lambda isa: isa.store_shared(isa.constant(0), [isa.constant(1)]), "two threads store"),
        (
            lambda isa: isa.load_global(isa.global_address(isa.array(np.zeros(4, np.int32))) + 16),
            "past the end",
        ),
        (lambda isa: isa.load_global(isa.constant(64, "i64")), "outside of every array"),
    ],
)
def test_refuses_bad_accesses(isa, access, message):
    with pytest.raises(EmulationError, match=message):
        access(isa)


class FlagsFirst(np.ndarray):
    """Memory that a store of two numbers with flags changes in two steps, the flags first."""

    def __setitem__(self, index, values):
        for columns in ([*range(4, 8), *range(12, 16)], slice(None)):
            super().__setitem__(index[:, columns], values[:, columns])
            time.sleep(0.05)


def test_a_number_is_stored_together_with_its_flag():
    """Another device, which runs in another thread, sees both or neither."""
    array = np.zeros(4 * THREADS, np.int32)

    def launched():
        isa = new_isa()
        return isa, isa.global_address(isa.array(array)) + isa.widen(isa.thread_index() << 4)

    def store():
        isa, address = launched()
        isa.memory.arrays[0] = isa.memory.arrays[0].view(FlagsFirst)
        isa.store_flagged(address, [isa.constant(1.5, "f32"), isa.constant(-2.0, "f32")], isa.constant(7))

    thread = threading.Thread(target=store)
    thread.start()
    isa, address = launched()
    numbers = isa.wait_flagged(address, isa.constant(7))
    thread.join()
    assert [np.unique(number.data).tolist() for number in numbers] == [[1.5], [-2.0]]
