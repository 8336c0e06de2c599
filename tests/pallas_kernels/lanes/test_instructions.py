"""The emulator: every instruction against its specification, and the errors that it must detect."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.lanes.emulated_memory import EmulationError
from pallas_kernels.lanes.emulator import LaneValue, NumpyInstructions
from pallas_kernels.lanes.instructions import Instructions

WARPS = 2
THREADS = 32 * WARPS


def new_isa() -> NumpyInstructions:
    return NumpyInstructions(blocks=1, threads=THREADS, shared_bytes=4096)


@pytest.fixture
def isa():
    return new_isa()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def integers(rng) -> LaneValue:
    return LaneValue(rng.integers(-(2**31), 2**31, THREADS).astype(np.int32), "i32")


def floats(rng) -> LaneValue:
    return LaneValue(rng.standard_normal(THREADS).astype(np.float32), "f32")


def test_emulator_implements_every_instruction():
    assert not NumpyInstructions.__abstractmethods__
    assert len(Instructions.__abstractmethods__) > 30


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda a, b: a + b, lambda a, b: a + b),
        (lambda a, b: a - b, lambda a, b: a - b),
        (lambda a, b: a * b, lambda a, b: a * b),
        (lambda a, b: a & b, lambda a, b: a & b),
        (lambda a, b: a | b, lambda a, b: a | b),
        (lambda a, b: a ^ b, lambda a, b: a ^ b),
        (lambda a, b: a << 3, lambda a, b: a << 3),
        (lambda a, b: a >> 3, lambda a, b: (a % 2**32) >> 3),
        (lambda a, b: a // b, lambda a, b: (a % 2**32) // (b % 2**32)),
        (lambda a, b: a % b, lambda a, b: (a % 2**32) % (b % 2**32)),
        (lambda a, b: new_isa().multiply_add(a, b, a), lambda a, b: a * b + a),
    ],
)
def test_integer_arithmetic_wraps_at_32_bits(rng, operation, expected):
    a, b = integers(rng), integers(rng)
    exact = expected(a.data.astype(object), b.data.astype(object))
    np.testing.assert_array_equal(operation(a, b).data.view(np.uint32), [int(v) % 2**32 for v in exact])


def test_comparisons_are_signed_and_false_on_nan(isa):
    a = LaneValue(np.where(np.arange(THREADS) < 2, -1, 1), "i32")
    assert (a < 0).data.sum() == 2
    assert (a >= 0).data.sum() == THREADS - 2
    assert a.equals(-1).data.sum() == 2
    nan = isa.constant(np.nan, "f32")
    assert not (nan < 1.0).data.any()
    assert not (nan >= 1.0).data.any()
    assert (~(nan < 1.0)).data.all()


def test_select_and_conversions(isa, rng):
    a, b = integers(rng), integers(rng)
    np.testing.assert_array_equal(isa.select(a < b, a, b).data, np.minimum(a.data, b.data))
    np.testing.assert_array_equal(isa.float_to_bits(isa.bits_to_float(a)).data, a.data)
    np.testing.assert_array_equal(isa.int_to_float(a).data, a.data.astype(np.float32))
    np.testing.assert_array_equal(isa.widen(a).data, a.data.astype(np.int64) % 2**32)
    halves = rng.standard_normal((THREADS, 2)).astype(np.float16)
    word = LaneValue(halves.view(np.int32)[:, 0], "i32")
    np.testing.assert_array_equal(isa.half_to_float(word, "low").data, halves[:, 0])
    np.testing.assert_array_equal(isa.half_to_float(word, "high").data, halves[:, 1])


def test_float_instructions(isa, rng):
    a, b, c = floats(rng), floats(rng), floats(rng)
    np.testing.assert_array_equal(isa.absolute(a).data, np.abs(a.data))
    exact = a.data.astype(np.float64) * b.data + c.data
    np.testing.assert_array_equal(isa.multiply_add(a, b, c).data, exact.astype(np.float32))
    np.testing.assert_allclose(isa.divide(a, b).data, a.data / b.data, rtol=3e-7)
    np.testing.assert_allclose(isa.reciprocal(a).data, 1 / a.data.astype(np.float64), rtol=3e-7)
    for data, expected in ((1e-39, np.inf), (3e38, 0.0), (np.inf, 0.0), (np.nan, np.nan)):
        result = isa.reciprocal(isa.constant(data, "f32")).data
        np.testing.assert_array_equal(result, np.float32(expected))
    np.testing.assert_allclose(isa.exp2(a * 10.0).data, np.exp2(10.0 * a.data.astype(np.float64)), rtol=3e-6)
    assert (isa.exp2(isa.constant(-1e30, "f32")).data == 0).all()
    exact = 1 / np.sqrt(np.abs(a.data.astype(np.float64)))
    np.testing.assert_allclose(isa.rsqrt(isa.absolute(a)).data, exact, rtol=3e-7)
    for data, expected in ((np.nan, np.nan), (-np.inf, np.inf)):
        np.testing.assert_array_equal(isa.absolute(isa.constant(data, "f32")).data, np.float32(expected))


def test_pack_bfloat16_rounds_to_even_and_keeps_nan(isa):
    for number, bits in ((1.0, 0x3F80), (1 + 2**-8, 0x3F80), (1 + 3 * 2**-8, 0x3F82), (-np.inf, 0xFF80)):
        word = isa.pack_bfloat16(isa.constant(number, "f32"), isa.constant(-2.0, "f32")).data
        assert (word.view(np.uint32) == (0xC000 << 16) + bits).all()
    nan = isa.pack_bfloat16(isa.constant(np.nan, "f32"), isa.constant(0.0, "f32")).data
    assert ((nan & 0x7F80) == 0x7F80).all()
    assert (nan & 0x7F).all()


def test_maximum_orders_numbers_infinity_and_nan(isa):
    ordered = [isa.float_to_bits(isa.constant(v, "f32")) for v in (0.0, 1e-30, 1.0, np.inf, np.nan)]
    for small, large in itertools.pairwise(ordered):
        np.testing.assert_array_equal(isa.maximum(small, large).data, large.data)
        np.testing.assert_array_equal(isa.maximum(large, small).data, large.data)


def test_permute_bytes(isa):
    low, high = isa.constant(0x33221100), isa.constant(0x77665544)
    assert (isa.permute_bytes(low, high, 0x3210).data == 0x33221100).all()
    assert (isa.permute_bytes(low, high, 0x7654).data == 0x77665544).all()
    assert (isa.permute_bytes(low, high, 0x0417).data == 0x00441177).all()


def test_warp_exchanges(isa, rng):
    a = LaneValue(rng.integers(0, 1000, THREADS), "i32")
    warps = a.data.reshape(WARPS, 32)
    np.testing.assert_array_equal(isa.shuffle_xor(a, 2).data, warps[:, np.arange(32) ^ 2].reshape(-1))
    odd = isa.ballot((a & 1).equals(1))
    expected = [sum(int(v % 2) << i for i, v in enumerate(warp)) for warp in warps]
    np.testing.assert_array_equal(odd.data.view(np.uint32), np.repeat(expected, 32))
    np.testing.assert_array_equal(isa.lower_lanes().data[[0, 1, 31, 33]], [0, 1, 2**31 - 1, 1])
    np.testing.assert_array_equal(isa.count_bits(odd).data, np.repeat((warps % 2).sum(1), 32))
    np.testing.assert_array_equal(isa.reduce_max(a).data, np.repeat(warps.max(1), 32))
    np.testing.assert_array_equal(isa.reduce_add(a).data, np.repeat(warps.sum(1), 32))


def test_matrix_multiply_add_follows_the_fragment_layout(isa, rng):
    a = rng.integers(0, 256, (WARPS, 16, 32))
    b = rng.integers(-128, 128, (WARPS, 32, 8))
    c = rng.integers(-1000, 1000, (WARPS, 16, 8))
    warp, lane = np.divmod(np.arange(THREADS), 32)
    row, column = lane // 4, lane % 4
    byte = np.arange(4)

    def word(bytes_):
        return LaneValue(bytes_.astype(np.uint8).copy().view(np.int32)[:, 0], "i32")

    a_blocks = ((0, 0), (1, 0), (0, 1), (1, 1))
    a_registers = [
        word(a[warp[:, None], (row + 8 * i)[:, None], (4 * column + 16 * j)[:, None] + byte])
        for i, j in a_blocks
    ]
    b_registers = [
        word(b[warp[:, None], (4 * column + 16 * j)[:, None] + byte, row[:, None]]) for j in (0, 1)
    ]
    c_elements = ((0, 0), (0, 1), (1, 0), (1, 1))
    c_registers = [LaneValue(c[warp, row + 8 * i, 2 * column + j], "i32") for i, j in c_elements]
    out = isa.matrix_multiply_add(c_registers, a_registers, b_registers)
    expected = a @ b + c
    for register, (i, j) in zip(out, c_elements, strict=True):
        np.testing.assert_array_equal(register.data, expected[warp, row + 8 * i, 2 * column + j])


def test_matrix_multiply_add_bfloat16_follows_the_fragment_layout(isa, rng):
    a, b, c = (rng.integers(-50, 50, (WARPS, *size)) for size in ((16, 16), (16, 8), (16, 8)))
    warp, lane = np.divmod(np.arange(THREADS), 32)
    row, column = lane // 4, lane % 4
    pair = np.arange(2)

    def word(numbers):
        return LaneValue(numbers.astype(ml_dtypes.bfloat16).view(np.int32)[:, 0], "i32")

    a_registers = [
        word(a[warp[:, None], (row + 8 * i)[:, None], (2 * column + 8 * j)[:, None] + pair])
        for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    b_registers = [word(b[warp[:, None], (2 * column + 8 * j)[:, None] + pair, row[:, None]]) for j in (0, 1)]
    c_elements = ((0, 0), (0, 1), (1, 0), (1, 1))
    c_registers = [LaneValue(c[warp, row + 8 * i, 2 * column + j], "f32") for i, j in c_elements]
    out = isa.matrix_multiply_add_bfloat16(c_registers, a_registers, b_registers)
    for register, (i, j) in zip(out, c_elements, strict=True):
        np.testing.assert_array_equal(register.data, (a @ b + c)[warp, row + 8 * i, 2 * column + j])


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


def test_byte_stores_leave_the_other_bytes(isa):
    thread = isa.thread_index()
    isa.store_shared(thread << 2, [isa.constant(0x11223344)])
    isa.block_barrier()
    isa.store_shared_byte(thread, thread + 0x5500, where=thread < 6)
    isa.block_barrier()
    words = isa.load_shared(thread << 2)[0].data
    assert words[:3].tolist() == [0x03020100, 0x11220504, 0x11223344]


def test_refuses_races_of_byte_stores(isa):
    thread = isa.thread_index()
    with pytest.raises(EmulationError, match="two threads store to one byte"):
        isa.store_shared_byte(thread >> 1, thread)
    isa = new_isa()
    isa.store_shared_byte(thread, thread)  # Different bytes of one word are no race.
    with pytest.raises(EmulationError, match="store after"):
        isa.store_shared_byte(thread ^ 1, thread)
    isa = new_isa()
    isa.store_shared_byte(thread, thread)
    with pytest.raises(EmulationError, match="load after"):
        isa.load_shared(thread & 0x3C)
    isa.block_barrier()
    isa.load_shared(thread & 0x3C)
    with pytest.raises(EmulationError, match="store after"):
        isa.store_shared_byte(thread, thread)
    isa = new_isa()
    isa.store_shared_byte(thread << 2, thread)
    isa.block_barrier()
    with pytest.raises(EmulationError, match="nothing has written"):
        isa.load_shared(thread << 2)
    with pytest.raises(EmulationError, match="outside of the 4096 bytes"):
        isa.store_shared_byte(thread + 4096, thread)


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


def test_loop_counts_may_differ_between_warps(isa):
    count = isa.select(isa.thread_index() < 32, isa.constant(3), isa.constant(5))
    (total,) = isa.loop(count, [isa.constant(0)], lambda i, carry: [carry[0] + i])
    np.testing.assert_array_equal(total.data, [3] * 32 + [10] * 32)


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


def test_refuses_warp_instructions_in_divergent_code(isa):
    with isa.when(isa.thread_index() < 5), pytest.raises(EmulationError, match="part of a warp"):
        isa.reduce_add(isa.constant(1))
    with isa.when(isa.thread_index() < 32), pytest.raises(EmulationError, match="part of a CTA"):
        isa.block_barrier()
