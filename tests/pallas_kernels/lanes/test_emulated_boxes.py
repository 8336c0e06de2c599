"""The emulator's copies of boxes: where elements arrive, and what it refuses."""

import numpy as np
import pytest
from one_cta import THREADS, new_isa

from pallas_kernels.lanes.emulated_memory import EmulationError

BARRIER = 3072
BOX_BYTES = 16 * 64


def start(isa, array=None, corner=(0, 0), box=(16, 16), expected=BOX_BYTES):
    """Starts one copy to the start of shared memory, whose size the barrier expects."""
    array = np.arange(32 * 64, dtype=np.int32).reshape(32, 64) if array is None else array
    ref, barrier = isa.array(array), isa.constant(BARRIER)
    with isa.when(isa.thread_index().equals(0)):
        isa.start_arrivals(barrier)
    isa.block_barrier()
    copy(isa, ref, corner, box, expected)
    return ref


def copy(isa, ref, corner=(0, 0), box=(16, 16), expected=BOX_BYTES):
    with isa.when(isa.thread_index().equals(0)):
        isa.expect_bytes(isa.constant(BARRIER), expected)
        corner = [isa.constant(index) for index in corner]
        isa.copy_box(isa.constant(0), ref, corner, box, isa.constant(BARRIER))


def wait(isa, parity=0):
    isa.wait_arrival(isa.constant(BARRIER), isa.constant(parity))


@pytest.mark.parametrize("dtype", [np.int32, np.int16])
@pytest.mark.parametrize("row_bytes", [64, 128])
def test_pieces_change_places_and_zeros_come_from_outside(isa, row_bytes, dtype):
    columns = row_bytes // np.dtype(dtype).itemsize
    array = np.arange(1, 1 + 2 * 20 * 96).reshape(2, 20, 96).astype(dtype)
    corner, box = (1, 10, 80), (1, 16, columns)
    start(isa, array, corner, box, 16 * row_bytes)
    wait(isa)
    words = [isa.load_shared((isa.thread_index() << 4) + 1024 * i, 4) for i in range(16 * row_bytes // 1024)]
    got = np.concatenate([np.stack([w.data for w in four], 1) for four in words]).reshape(-1)
    got = got.view(dtype).reshape(16, row_bytes // 16, -1)
    padded = np.pad(array, ((0, 0), (0, 16), (0, 128)))[1, 10:26, 80 : 80 + columns]
    expected = padded.reshape(got.shape)
    for row in range(16):
        for piece in range(row_bytes // 16):
            place = piece ^ (row % 8 if row_bytes == 128 else row // 2 % 4)
            np.testing.assert_array_equal(got[row, place], expected[row, piece])


def test_a_slot_is_used_again_after_a_barrier(isa):
    ref = start(isa)
    wait(isa)
    isa.load_shared(isa.thread_index() << 4)
    isa.block_barrier()
    copy(isa, ref, (16, 0))
    wait(isa, 1)
    assert isa.load_shared(isa.constant(0))[0].data[0] == 16 * 64
    isa.finish()


def test_refuses_loads_before_the_warp_has_waited(isa):
    start(isa)
    with pytest.raises(EmulationError, match="a copy is still writing"):
        isa.load_shared(isa.constant(0))
    with isa.when(isa.thread_index() < 32):
        wait(isa)
        isa.load_shared(isa.constant(0))
    with isa.when(isa.thread_index() >= 32), pytest.raises(EmulationError, match="has not waited for"):
        isa.load_shared(isa.constant(0))


@pytest.mark.parametrize("expected", [BOX_BYTES - 16, BOX_BYTES + 16])
def test_refuses_a_wait_that_never_ends(isa, expected):
    start(isa, expected=expected)
    with pytest.raises(EmulationError, match=f"{expected} bytes expected, 1024 copied"):
        wait(isa)


def test_refuses_a_wait_for_a_phase_that_nothing_starts(isa):
    start(isa)
    wait(isa)
    with pytest.raises(EmulationError, match="0 bytes expected, 0 copied"):
        wait(isa, 1)


def test_refuses_to_overwrite(isa):
    ref = start(isa)
    with pytest.raises(EmulationError, match="a copy is still writing"):
        isa.store_shared(isa.thread_index() << 2, [isa.constant(0)])
    with pytest.raises(EmulationError, match="two expect_bytes"):
        copy(isa, ref)
    isa = new_isa()
    ref = start(isa)
    wait(isa)
    isa.load_shared(isa.thread_index() << 4)
    with pytest.raises(EmulationError, match="race"):
        copy(isa, ref)


def test_refuses_bad_boxes_and_barriers(isa):
    ref = start(isa)
    barrier, zero = isa.constant(BARRIER), isa.constant(0)
    with isa.when(isa.thread_index().equals(0)):
        with pytest.raises(EmulationError, match="64 or 128 bytes, not 32"):
            isa.copy_box(zero, ref, [zero, zero], (16, 8), barrier)
        with pytest.raises(EmulationError, match="256 of a box is not a multiple of 8 rows"):
            isa.copy_box(isa.constant(256), ref, [zero, zero], (16, 16), barrier)
        with pytest.raises(EmulationError, match="outside of the 4096 bytes"):
            isa.copy_box(isa.constant(3584), ref, [zero, zero], (16, 16), barrier)
        with pytest.raises(EmulationError, match="start_arrivals has not made"):
            isa.expect_bytes(isa.constant(8), 16)
    with pytest.raises(EmulationError, match="copies of boxes that no warp has waited for"):
        isa.finish()
    with isa.when(isa.thread_index() < THREADS // 4), pytest.raises(EmulationError, match="part of a warp"):
        wait(isa)
