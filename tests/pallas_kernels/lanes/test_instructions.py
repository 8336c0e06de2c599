"""The emulator: the instructions on registers, of warps and of control flow, against their specification."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from one_cta import THREADS, WARPS, new_isa

from pallas_kernels.lanes.emulated_memory import EmulationError
from pallas_kernels.lanes.emulator import LaneValue, NumpyInstructions
from pallas_kernels.lanes.instructions import Instructions


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


def test_select_bits(isa, rng):
    a, b = integers(rng), integers(rng)
    mask = np.uint32(0xCCCC0FF1)
    expected = (a.data.view(np.uint32) & mask) | (b.data.view(np.uint32) & ~mask)
    np.testing.assert_array_equal(isa.select_bits(int(mask), a, b).data.view(np.uint32), expected)


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


def test_warpgroup_multiply_add_follows_the_layout(rng):
    warps = 4
    isa = NumpyInstructions(blocks=1, threads=32 * warps, shared_bytes=1024)
    a = rng.integers(0, 256, (2, warps, 16, 32))
    b = rng.integers(-128, 128, (32, 16)).astype(np.int8)
    c = rng.integers(-1000, 1000, (2, warps, 16, 16))
    stored = np.zeros(512, np.int8)
    for k in range(32):
        for j in range(16):
            stored[256 * (j // 8) + 128 * (k // 16) + 16 * (j % 8) + k % 16] = b[k, j]
    thread = isa.thread_index()
    isa.store_shared((thread << 2) + 256, [LaneValue(stored.view(np.int32), "i32")])
    isa.publish_operands()
    isa.block_barrier()
    warp, lane = np.divmod(np.arange(32 * warps), 32)
    row, column = lane // 4, lane % 4
    index = [(row + 8 * i, 4 * column + 16 * j) for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]

    def word(bytes_):
        return LaneValue(bytes_.astype(np.uint8).copy().view(np.int32)[:, 0], "i32")

    a_registers = [
        [word(m[warp[:, None], r[:, None], k[:, None] + np.arange(4)]) for r, k in index] for m in a
    ]
    elements = [
        (row + 8 * i, 8 * tile + 2 * column + j) for tile in range(2) for i in range(2) for j in range(2)
    ]
    c_registers = [[LaneValue(m[warp, r, n], "i32") for r, n in elements] for m in c]
    queued = isa.queue_warpgroup_multiply_add(c_registers, a_registers, isa.constant(64), 192)
    out = isa.finish_warpgroup_multiply_add(queued)
    for i in range(2):
        for register, (r, n) in zip(out[i], elements, strict=True):
            np.testing.assert_array_equal(register.data, (a[i] @ b.astype(int) + c[i])[warp, r, n])


def test_warpgroup_multiply_add_bfloat16_follows_the_layout(rng):
    warps, columns = 8, 24
    isa = NumpyInstructions(blocks=1, threads=32 * warps, shared_bytes=4096)
    a = rng.integers(-50, 50, (2, 2, warps, 16, 16))  # for each B and each C
    b = rng.integers(-50, 50, (2, 16, columns))
    c = rng.integers(-1000, 1000, (2, warps, 16, columns))
    stored = np.zeros(2048, ml_dtypes.bfloat16)
    for i, k, n in np.ndindex(b.shape):
        piece, in_piece = divmod(32 * i + 2 * k, 16)  # 16 bytes of the row, which change places with others
        stored[(128 * n + 16 * (piece ^ n % 8) + in_piece) // 2] = b[i, k, n]
    thread = isa.thread_index()
    words = stored.view(np.int32).reshape(warps * 32, 4)
    isa.store_shared(thread << 4, [LaneValue(np.ascontiguousarray(words[:, i]), "i32") for i in range(4)])
    isa.publish_operands()
    isa.block_barrier()
    warp, lane = np.divmod(np.arange(32 * warps), 32)
    row, column = lane // 4, lane % 4
    pair = np.arange(2)

    def word(numbers):
        return LaneValue(numbers.astype(ml_dtypes.bfloat16).view(np.int32)[:, 0], "i32")

    places = [(row + 8 * i, 2 * column + 8 * j) for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    a_registers = [
        [[word(m[warp[:, None], r[:, None], k[:, None] + pair]) for r, k in places] for m in step]
        for step in a
    ]
    elements = [
        (row + 8 * i, 8 * tile + 2 * column + j) for tile in range(3) for i in range(2) for j in range(2)
    ]
    c_registers = [[LaneValue(m[warp, r, n].astype(np.float32), "f32") for r, n in elements] for m in c]
    for start, registers in ((c, c_registers), (0 * c, None)):
        out, _ = isa.warpgroup_multiply_add_bfloat16(columns, registers, a_registers, isa.constant(0))
        for i in range(2):
            exact = sum(a[step, i] @ b[step] for step in range(2)) + start[i]
            for register, (r, n) in zip(out[i], elements, strict=True):
                np.testing.assert_array_equal(register.data, exact[warp, r, n])


def test_multiply_add_bfloat16_rounds_once(isa, rng):
    def pairs(numbers):
        return LaneValue(numbers.astype(ml_dtypes.bfloat16).view(np.int32)[:, 0], "i32")

    a, b, c = (rng.integers(-255, 256, (THREADS, 2)) for _ in range(3))
    out = isa.multiply_add_bfloat16(pairs(a), pairs(b), pairs(c)).data.view(ml_dtypes.bfloat16)
    exact = (a * b + c).astype(np.float32)  # below 2**24, so only the next conversion rounds
    np.testing.assert_array_equal(out, exact.astype(ml_dtypes.bfloat16).reshape(-1))
    nan = isa.multiply_add_bfloat16(*[isa.constant(0x7FC03F80)] * 3).data.view(ml_dtypes.bfloat16)
    assert (nan[::2] == 2).all()
    assert np.isnan(nan[1::2].astype(np.float32)).all()


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


def test_loop_counts_may_differ_between_warps(isa):
    count = isa.select(isa.thread_index() < 32, isa.constant(3), isa.constant(5))
    (total,) = isa.loop(count, [isa.constant(0)], lambda i, carry: [carry[0] + i])
    np.testing.assert_array_equal(total.data, [3] * 32 + [10] * 32)


def test_refuses_warp_instructions_in_divergent_code(isa):
    with isa.when(isa.thread_index() < 5), pytest.raises(EmulationError, match="part of a warp"):
        isa.reduce_add(isa.constant(1))
    with isa.when(isa.thread_index() < 32), pytest.raises(EmulationError, match="part of a CTA"):
        isa.block_barrier()
