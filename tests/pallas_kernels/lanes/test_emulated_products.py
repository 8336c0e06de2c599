"""The emulator refuses products of warpgroups that a GPU may compute with other operands or too late."""

import pytest

from pallas_kernels.lanes.emulated_memory import EmulationError
from pallas_kernels.lanes.emulator import NumpyInstructions

THREADS = 128


@pytest.fixture
def isa():
    return NumpyInstructions(blocks=1, threads=THREADS, shared_bytes=4096)


def store_operands(isa):
    isa.store_shared(isa.thread_index() << 4, [isa.constant(0x01020304)] * 4)


def queue(isa, sums=None):
    sums = sums or [[isa.constant(0)] * 8]
    return isa.queue_warpgroup_multiply_add(sums, [[isa.constant(0x01010101)] * 4], isa.constant(0), 0)


def test_operands_are_published_before_a_barrier(isa):
    store_operands(isa)
    isa.publish_operands()
    isa.block_barrier()
    sums = isa.finish_warpgroup_multiply_add(queue(isa))
    assert (sums[0][0].data == 8 * (1 + 2 + 3 + 4)).all()


def test_refuses_operands_that_are_not_published(isa):
    store_operands(isa)
    isa.block_barrier()
    with pytest.raises(EmulationError, match="publish_operands first"):
        isa.finish_warpgroup_multiply_add(queue(isa))


def test_refuses_operands_that_are_published_behind_the_barrier(isa):
    store_operands(isa)
    isa.block_barrier()
    isa.publish_operands()
    with pytest.raises(EmulationError, match="product after the publishing of another thread"):
        isa.finish_warpgroup_multiply_add(queue(isa))


def test_every_writer_publishes_and_again_after_each_store(isa):
    store_operands(isa)
    with isa.when(isa.thread_index() < 31):
        isa.publish_operands()
    isa.block_barrier()
    with pytest.raises(EmulationError, match="publish_operands first"):
        isa.finish_warpgroup_multiply_add(queue(isa))
    isa.publish_operands()
    isa.block_barrier()
    isa.store_shared(isa.thread_index() << 4, [isa.constant(0)] * 4)
    isa.block_barrier()
    with pytest.raises(EmulationError, match="publish_operands first"):
        isa.finish_warpgroup_multiply_add(queue(isa))


def test_refuses_sums_of_a_queued_product(isa):
    store_operands(isa)
    isa.publish_operands()
    isa.block_barrier()
    sums = queue(isa)
    for use in (
        lambda v: v + 1,
        lambda v: isa.select(v, v, v),
        lambda v: isa.store_shared(isa.thread_index() << 2, [v]),
        lambda v: isa.loop(isa.constant(1), [isa.constant(0)], lambda i, carry: [v]),
    ):
        with pytest.raises(EmulationError, match="used before finish"):
            use(sums[0][0])
    with pytest.raises(EmulationError, match="ends with a queued product"):
        isa.finish()
    later = queue(isa)
    with pytest.raises(EmulationError, match="used before finish"):
        isa.finish_warpgroup_multiply_add(sums)[0][0] + 1
    del later


def test_refuses_to_change_operands_of_a_queued_product(isa):
    """The matrix unit may read B until the warp has waited for the product."""
    store_operands(isa)
    isa.publish_operands()
    isa.block_barrier()
    sums = queue(isa)
    isa.block_barrier()
    store_operands(isa)
    with pytest.raises(EmulationError, match="race"):
        isa.finish_warpgroup_multiply_add(sums)
